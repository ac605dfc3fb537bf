"""`hasten train` before, while and after it trains: what it will take, what its student makes, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hasten.distill.loop import memory_plan
from hasten.distill.loop.memory_plan import MemoryPlan, check_fits, check_room, plan
from hasten.distill.loop.samples import sheet
from hasten.distill.loop.state import claimed
from hasten.distill.train_config import load_config
from hasten.distill.training import train
from hasten.errors import HastenError, ResumeError, UsageError

SMALL = {
    "model": "tiny-flux", "data.count": 20, "data.prompts": ["a seven", "a three"], "data.call.num_inference_steps": 2,
    "train.batch": 2, "rank": 4,
}  # fmt: skip
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A training that was looked at, stopped and resumed."""
    out = tmp_path_factory.mktemp("looked")
    given = {"train.samples_every": 2, "train.samples": 2, "train.recall": 16, "train.steps": 3, "train.warmup": 0}
    config, said = load_config("pairs", None, SMALL | given), []
    train(config, out, stop_after=2, progress=False, say=said.append)
    first = (out / "samples" / "000002.png").read_bytes()
    train(config, out, resume=True, progress=False)
    assert (out / "samples" / "000002.png").read_bytes() == first
    assert any(text.startswith("Memory plan: weights") for text in said)
    yield out


def test_sheets_show_the_teacher_above_the_student(looked: Path) -> None:
    names = sorted(file.name for file in (looked / "samples").iterdir())
    assert names == ["000002.png", "000003.png"]
    two, three = (np.asarray(Image.open(looked / "samples" / name), dtype=int) for name in names)
    assert two.shape == three.shape == (2 * 32 + 2, 2 * 32 + 2, 3)
    assert np.array_equal(two[:32], three[:32]), "the teacher's row stays"
    assert not np.array_equal(two[34:], three[34:]), "the student's does not"
    rows = [json.loads(line) for line in (looked / "log.jsonl").read_text().splitlines()]
    assert ["recall" in row for row in rows] == [False, True, True]
    assert all(0 <= row["recall"] <= 1 for row in rows[1:])


def test_looking_changes_nothing(looked: Path, tmp_path: Path) -> None:
    config = load_config("pairs", None, SMALL | {"train.steps": 3, "train.warmup": 0})
    train(config, tmp_path / "plain", progress=False)
    one, two = (load_file(out / "latest" / "student" / "weights.safetensors") for out in (looked, tmp_path / "plain"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_clips_become_strips() -> None:
    teacher, student = (np.full((3, 4, 5, 3), value) for value in (0.0, 0.5))
    made = np.asarray(sheet([[teacher, teacher], [student, student]]))
    assert made.shape == (4 * 4 + 3 * 2, 3 * 5 + 2 * 2, 3)
    assert [int(made[y, 0, 0]) for y in (0, 6, 12, 18)] == [0, 128, 0, 128]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("model", ["tiny-flux", "tiny-image", "tiny-video"])
def test_the_plan_counts_what_the_training_then_has(model: str, full: bool) -> None:
    """Against roles that were really cast: weights and what is trained, exactly."""
    from hasten.distill.network.host_call import learn
    from hasten.distill.network.roles import Adapter, Roles
    from hasten.pipelines import loading, tiny_models

    config = load_config("lcm", None, {"model": model, "rank": 4, "full": full, "train.batch": 4})
    found = plan(config)
    assert found is not None
    pipe = loading.open_pipeline(model, device="cpu", dtype="float32", quiet=True)
    others = [part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module) and name != "transformer"]
    host, _ = learn(pipe, ["a seven"], **tiny_models.call_defaults(pipe))
    base = sum(p.numel() for p in host.network.parameters())
    roles = Roles.of_copies(host, config.method.trains) if full else Roles.on_one_base(host, config.method.trains, Adapter(4, 4.0))
    each = sum(p.numel() for p in roles["student"].parameters().values())
    held = 4 * (base * (3 if full else 1) + sum(p.numel() for part in others for p in part.parameters()))
    assert found.weights == pytest.approx(held, rel=0.01)  # a text encoder may share weights that the file has twice
    assert found.trained == 4 * each * (3 + 1) + (0 if full else 4 * each * 2)
    assert found.activations > 0


def test_a_model_of_ones_own_is_planned_for_the_size_it_is_called_with() -> None:
    """Sizes that the call leaves out are the pipeline's or the network's own; where neither has one, there is no estimate."""
    from hasten.pipelines import tiny_models

    def planned(model: str, **call: int) -> MemoryPlan:
        given = {"model": str(tiny_models.path(model)), "data.prompts": ["a seven"], "rank": 4, "train.batch": 4}
        found = plan(load_config("pairs", None, given | {f"data.call.{name}": value for name, value in call.items()}))
        assert found is not None
        return found

    wan = {"height": 480, "width": 832, "num_frames": 81}  # the defaults of WanPipeline
    assert planned("tiny-video") == planned("tiny-video", **wan) != planned("tiny-video", **wan | {"num_frames": 17})
    assert planned("tiny-image").activations == planned("tiny-image", height=32, width=32).activations > 0
    assert "activations not estimated (it needs data.call.height" in planned("tiny-flux").told()
    assert "activations about" in planned("tiny-flux", height=64, width=64).told()


def test_what_cannot_fit_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free", lambda: 100 * 2**20)
    monkeypatch.setattr("hasten.pipelines.loading.open_pipeline", lambda *a, **k: pytest.fail("something was loaded"))
    config = load_config("pairs", None, SMALL | {"train.batch": 4096})
    with pytest.raises(UsageError, match="It does not fit; most are activations. Lower train.batch, raise train.accumulate"):
        train(config, tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()


def test_who_says_no_prompts_is_told_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.pipelines.loading.open_pipeline", lambda *a, **k: pytest.fail("something was loaded"))
    with pytest.raises(UsageError, match="There are no prompts. Pass --prompts FILE"):
        train(load_config("pairs", None, {"model": "owner/name"}), tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("model", "odd"), [("tiny-flux", "hight"), ("tiny-image", "heights")])
def test_an_argument_that_the_pipeline_does_not_take_is_named(tmp_path: Path, model: str, odd: str) -> None:
    """PixArt's pipeline would take any further one, and pass over it."""
    with pytest.raises(UsageError, match=rf"data.call.{odd}: \w+ takes no '{odd}'. Did you mean 'height'\? Allowed: prompt, "):
        train(load_config("pairs", None, SMALL | {"model": model, f"data.call.{odd}": 64}), tmp_path / "a", progress=False)


@pytest.mark.parametrize(
    ("parts", "words"),
    [((900, 1, 1), "Train an adapter instead of copies"), ((1, 900, 1), "Lower student.rank"), ((1, 1, 900), "Lower train.batch")],
)
def test_what_is_most_is_what_is_to_be_changed(parts: tuple[int, int, int], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free", lambda: 500)
    with pytest.raises(UsageError, match=words):
        check_fits(MemoryPlan(*parts, disk=0))
    monkeypatch.setattr(memory_plan, "free", lambda: 1000)
    check_fits(MemoryPlan(*parts, disk=0))
    monkeypatch.setattr(memory_plan, "free", lambda: 700)
    if parts[2] == 900:  # the estimate alone is too high
        check_fits(found := MemoryPlan(*parts, disk=0))
        assert found.told().endswith("that are free. It may not fit.")


def test_a_full_disk_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Two checkpoints of .* must fit on the disk"):
        check_room(2**60, tmp_path / "not" / "there" / "yet")


def test_missing_packages_are_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.pipelines.loading.open_pipeline", lambda *a, **k: pytest.fail("something was loaded"))
    monkeypatch.setattr("hasten.distill.loop.log.find_spec", lambda name: None)
    for given, words in (({"train.optimizer": "adamw8bit"}, "bitsandbytes"), ({"train.report_to": "trackio"}, "trackio")):
        with pytest.raises(HastenError, match=words):
            train(load_config("pairs", None, SMALL | given), tmp_path / "a", progress=False)


def test_language_models_are_trained_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="Language models are trained in one process"):
        train(load_config("medusa", None, {"model": "tiny-lm"}), tmp_path / "a", progress=False)


def test_settings_that_an_older_version_did_not_know_are_no_difference(tmp_path: Path) -> None:
    """But for their own value: then a training is not resumed as another."""
    wanted = {"train": {"steps": 3, "optimizer": "adamw"}}
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 3}}))
    with claimed(tmp_path, wanted, True, ("train.steps",), wanted):
        pass
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 3}}))
    other = {"train": {"steps": 3, "optimizer": "adamw8bit"}}
    with pytest.raises(ResumeError, match="train.optimizer was 'adamw', now 'adamw8bit'"), claimed(tmp_path, other, True, (), wanted):
        pass


@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_sigterm_writes_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--model", "tiny-flux", "--set", "data.count=2", "--set", "data.prompts=[a seven]", "--set", "data.call.num_inference_steps=2",
             "--train_batch_size", "2", "--rank=2", "--max_train_steps", "100000"]  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-m", "hasten", "train", "pairs", "--out", str(out), *words], cwd=REPOSITORY, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while child.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    told = child.communicate()[1]
    assert child.returncode == 143, told
    step = json.loads((out / "latest" / "state.json").read_text())["step"]
    assert f"Stopped after step {step} of 100000, with a checkpoint. Go on with --resume." in " ".join(told.split())
