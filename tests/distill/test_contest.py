"""The contest of `hasten bench distill`: its measures, its bars, and that a student in it is the student its users have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.distill.bench import table
from hasten.distill.bench.contest import Contest, prompts, whole_clips
from hasten.distill.bench.judged import sliced
from hasten.distill.bench.table import ahead, bars, lora, near, student
from hasten.distill.network.chunks import Chunks
from hasten.distill.pretrain.config import parse_as
from hasten.distill.train_config import TrainConfig
from hasten.distill.trained import open_trained
from hasten.distill.training import train
from hasten.errors import UsageError
from hasten.pipelines.recipes import recipe

CALL = {"num_inference_steps": 2}


def trained(folder: Path, **method: Any) -> Path:
    raw = {
        "model": "tiny-image", "student": {"rank": 2}, "method": {"kind": "pairs", **method},
        "data": {"prompts": ["a seven", "a three"], "count": 4, "call": CALL},
        "train": {"steps": 3, "batch": 4, "lr": 1e-3, "warmup": 0},
    }  # fmt: skip
    train(parse_as(TrainConfig, raw, "test"), folder, progress=False)
    return folder


@pytest.mark.parametrize("calls", [1, 4])
def test_a_student_in_the_contest_is_the_one_that_users_have(tmp_path: Path, calls: int) -> None:
    folder = trained(tmp_path / "run", calls=calls)
    contest = Contest.of("tiny-image", 3, CALL)
    ours = contest.student(open_trained(folder), calls)
    theirs = contest.recipe(recipe(str(folder / "student" / "recipe.yaml")))
    assert ours.evaluations == theirs.evaluations == calls
    plain = contest.solver("keep", 2)
    assert torch.allclose(ours.x0, theirs.x0, atol=2e-4), "one network, one noise"
    assert not torch.allclose(ours.x0, plain.x0, atol=1e-2)


CLIP = CALL | {"num_frames": 9, "height": 16, "width": 16}


@pytest.fixture(scope="module", params=["causal", "magic141"])
def in_chunks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose first chunk is one frame, trained for two steps."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    own: dict[str, Any] = {"causal": {"chunk": 2, "first": 1}, "magic141": {"ratio": 1}}[request.param]
    raw = {
        "model": "tiny-video", "student": {"rank": 2}, "method": {"kind": request.param, "calls": 2, "how": "ode", **own},
        "data": {"prompts": ["a seven moving left"], "count": 2, "call": CLIP},
        "train": {"steps": 2, "batch": 1, "lr": 1e-2, "warmup": 0},
    }  # fmt: skip
    train(parse_as(TrainConfig, raw, "test"), folder, progress=False)
    return folder


def test_a_student_in_chunks_is_measured_as_its_users_have_it(in_chunks: Path) -> None:
    contest, opened = Contest.of("tiny-video", 3, CLIP), open_trained(in_chunks)
    assert contest.z.shape[2] == 5 and isinstance(opened.student, Chunks)
    ours, theirs = contest.student(opened, 1), contest.recipe(recipe(str(in_chunks / "student" / "recipe.yaml")))
    assert torch.allclose(ours.x0, theirs.x0, atol=2e-4)
    # Two calls for each frame, and all but the last chunk once more: 1 + 2 + 2 frames, or 1 + 4.
    assert ours.evaluations == theirs.evaluations == {3: (10 + 3) / 5, 2: (10 + 1) / 5}[len(opened.student.spans(5))]
    given = contest.teacher(2).x0[:, :, :1]
    of_picture = contest.chunks(opened.student, given)
    assert torch.equal(of_picture.x0[:, :, :1], given) and not torch.allclose(of_picture.x0[:, :, 1:], ours.x0[:, :, 1:], atol=1e-2)
    assert of_picture.evaluations == pytest.approx(ours.evaluations - 2 / 5), "the picture is seen, but not made"


def test_rows_of_students_in_chunks(in_chunks: Path) -> None:
    contest = Contest.of("tiny-video", 4, CLIP)
    said: list[str] = []
    rows = table.teacher(contest, [2], said.append) + student(contest, in_chunks, [1, 4, 8], said.append)
    own = [row for row in rows if row["who"] == "student"]
    magic = own[0]["method"] == "magic141"
    assert [row["name"] for row in own] == ["run", "run, first frame given"][: 1 + magic]
    assert all(row["calls"] == 2 and row["chunks"] == ([1, 4] if magic else [1, 2, 2]) for row in own)
    assert own[0]["note"] == f"chunks of {'1 + 4' if magic else '1 + 2 + 2'} latent frames, calls of each"
    assert not magic or own[1]["note"].endswith("; the first is the teacher's of 2 steps")
    whole = [{**row, "calls": 4} for row in own]  # one of four calls would meet, or miss, the bar of four calls
    fifty = [{**rows[0], "calls": table.FULL_STEPS}]
    verdicts = [bar.met for bar in bars([*fifty, *whole]) if "4-call student" in bar.bar]
    assert verdicts == [None], "their calls are no calls of a whole sample"
    for row in whole:
        del row["chunks"]
    assert [bar.met for bar in bars([*fifty, *whole]) if "4-call student" in bar.bar] != [None]
    table.tell_card(rows, in_chunks)
    card = (in_chunks / "student" / "README.md").read_text()
    assert "teacher, 2 steps" in card and ("student, first frame given" in card) is magic


def test_evaluations_in_whole_clips() -> None:
    assert whole_clips([(0, 4)], 3) == 3
    assert whole_clips([(0, 1), (1, 4)], 3) == pytest.approx((12 + 1) / 4)
    assert whole_clips([(0, 1), (1, 4)], 3, ready=1) == pytest.approx((9 + 1) / 4)
    assert whole_clips([(0, 3), (3, 6), (6, 7)], 1) == pytest.approx((7 + 6) / 7)


def test_other_models_students_are_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    contest = Contest.of("tiny-flux", 2, CALL)
    with pytest.raises(UsageError, match="is a student of tiny-image"):
        student(contest, folder, [1], print)
    with pytest.raises(UsageError, match="There is no training"):
        open_trained(tmp_path)
    with pytest.raises(UsageError, match="The judge reads digits"):
        Contest.of("tiny-dllm", 2)


def test_solvers_are_the_pipeline_with_another_scheduler_and_leave_no_trace() -> None:
    contest = Contest.of("tiny-flux", 5, CALL)
    own = contest.pipe.scheduler
    assert set(contest.solvers()) == {"euler", "unipc", "dpm++"}
    euler, guided = contest.solver("euler", 2, guided=False), contest.solver("keep", 2)
    assert contest.pipe.scheduler is own
    assert (euler.evaluations, guided.evaluations) == (2, 4)
    row = contest.row(guided)
    assert set(row) == {"evaluations", "seconds", "frechet", "sliced", "recall", "precision", "accuracy"}


def test_prompts_are_all_there_are_in_turn() -> None:
    assert len(set(prompts("image", 100))) == 100 and len(set(prompts("video", 80))) == 80
    assert prompts("image", 101)[100] == prompts("image", 1)[0]


def test_the_sliced_distance_of_a_shift() -> None:
    g = torch.Generator().manual_seed(0)
    real = torch.randn(20_000, 4, generator=g)
    assert sliced(real[:5000], real) < 0.05
    # Directions are uniform: the mean square of u_1 in four dimensions is 1/4.
    moved = real + torch.tensor([3.0, 0, 0, 0])
    assert sliced(moved, real) == pytest.approx(1.5, rel=0.1)
    assert sliced(10 * moved, 10 * real) == pytest.approx(sliced(moved, real), rel=1e-3), "in units of the deviation"


TEACHER = {"who": "teacher", "name": "its own", "calls": 50, "frechet": 10.0, "recall": 0.8, "accuracy": 0.95}


def made(name: str, frechet: float, calls: int = 1, **more: Any) -> dict[str, Any]:
    usual = {"who": "student", "name": name, "calls": calls, "frechet": frechet, "recall": 0.8, "accuracy": 0.95}
    return usual | {"weights": "rank 8", "method": name, "trained_for": calls} | more


@pytest.mark.parametrize(
    ("rows", "met", "words"),
    [
        ([made("a", 11.4)], True, "1.14x"),
        ([made("a", 11.6)], False, "1.16x"),
        ([made("a", 5.0, recall=0.74)], False, "recall 0.740 of 0.800"),
        ([made("a", 5.0, accuracy=0.92)], False, "accuracy 0.920"),
        ([made("a", 5.0, recall=0.1), made("b", 11.0)], True, "b: 1.10x"),
        ([made("a", 5.0, calls=2)], None, "no row"),
    ],
)
def test_near_the_teacher_in_all_measures(rows: list[dict[str, Any]], met: bool | None, words: str) -> None:
    bar = near([TEACHER, *rows], 1, 1.15)
    assert bar.met is met and words in bar.detail


def test_far_ahead_of_the_best_solver() -> None:
    solvers = [made("ddim", 90.0, who="solver"), made("unipc", 30.0, who="solver"), {"who": "solver", "calls": 1, "note": "refused"}]
    assert ahead([*solvers, made("a", 14.9)], 1).met
    assert not ahead([*solvers, made("a", 15.1)], 1).met
    assert ahead([made("a", 15.1)], 1).met is None


def test_an_adapter_against_all_weights() -> None:
    full = made("pairs", 10.0, weights="all")
    assert lora([full, made("pairs", 11.4)]).met and not lora([full, made("pairs", 11.6)]).met
    assert lora([full, made("dmd", 9.0)]).met is None, "another method"
    assert lora([full | {"calls": 2}, made("pairs", 9.0) | {"calls": 2}]).met is None, "not what they were trained for"
    assert len(bars([TEACHER, full])) == 6
