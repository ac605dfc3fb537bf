"""Styles beside a student in training: on for everybody or for nobody, the same after a resume, and worth it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.distill.chain import load_chain
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.methods.guidance import Guidance
from hasten.distill.network import styles
from hasten.distill.network.roles import Adapter, Guided, Roles
from hasten.distill.train_config import load_config
from hasten.errors import ModelError, UsageError
from hasten.pipelines import loading
from hasten.pipelines.lora import Lora, LowRank
from hasten.pipelines.seams.adapter import add
from tests.distill import toys
from tests.distill.test_trainer import same, weights

SCALE = 4.0


def style(seed: int, strength: float = 1.0) -> Lora:
    """A random change of both layers of a toy."""
    g = torch.Generator().manual_seed(seed)
    widths = {"first": (16, 2 * toys.WIDTH + 1), "last": (toys.WIDTH, 16)}
    layers = {
        name: LowRank(torch.randn(2, wide, generator=g) / wide**0.5, strength * torch.randn(high, 2, generator=g) / 4, 2.0)
        for name, (high, wide) in widths.items()
    }
    return Lora("toy", layers)


def trained(out: Path, known: int, steps: int = 6, stop: int | None = None, resume: bool = False, **settings: Any) -> Trainer:
    """A guidance student of a toy that has three styles on it, of which `known` are met in training."""
    host = toys.host()
    for number in range(1, 4):
        add(host.network, style(number), f"style_{number}")
    torch.manual_seed(0)
    roles = Roles.on_one_base(host, ["student"], Adapter(rank=8, alpha=8.0))
    roles.styles = {f"style_{number}": f"{number}.safetensors" for number in range(1, known + 1)}
    chosen = TrainSettings(**{"steps": steps, "batch": 8, "lr": 1e-2, "warmup": 2, "average": 0.0, **settings})
    made = Trainer(Guidance(scale=(SCALE, SCALE)), roles, toys.store(), chosen, out, (toys.WIDTH,), progress=False)
    made.fit(resume, stop)
    return made


@torch.no_grad()
def apart(made: Trainer, names: tuple[str, ...]) -> float:
    """Mean square between the guided teacher and the student, both with these adapters."""
    store, g = toys.store(), torch.Generator().manual_seed(9)
    assert store.x0 is not None
    x0, condition = store.x0.repeat(8, 1), store.conditions.rows(store.prompt.repeat(8))
    tau = made.roles["teacher"].host.path.angle(1000 * torch.rand(len(x0), generator=g, dtype=torch.float64))
    x = tau.cos()[:, None].float() * x0 + tau.sin()[:, None].float() * torch.randn(x0.shape, generator=g)
    stage = made.roles["teacher"].stage
    assert stage is not None
    with stage.styled(names):
        wanted = Guided(made.roles["teacher"], store.empty, SCALE).velocity(x, tau, condition)
        return float((made.roles["student"].velocity(x, tau, condition) - wanted).square().mean())


def test_a_style_is_on_for_everybody_or_for_nobody(tmp_path: Path) -> None:
    made = trained(tmp_path / "a", 2, steps=1)
    stage, seen = made.roles["teacher"].stage, set()
    assert stage is not None
    for step in range(40):
        with made.roles.styled(Draw(0, step, range(3))):
            on = set()
            for role in made.roles.values():
                with role.playing():
                    on.add(tuple(name for name in stage._active if name.startswith("style")))
            assert len(on) == 1
            seen |= on
        with made.roles["student"].playing():
            assert stage._active == ("student",)
    assert seen == {(), ("style_1",), ("style_2",)}  # the third is on the network, and is not trained with


def test_a_student_goes_with_styles_that_it_was_trained_beside(tmp_path: Path) -> None:
    alone, beside = (trained(tmp_path / str(n), n, steps=200, batch=24) for n in (0, 3))
    each = [("style_1",), ("style_2",), ("style_3",)]
    assert sum(apart(beside, names) for names in each) < 0.5 * sum(apart(alone, names) for names in each)


def test_resumed_bit_for_bit(tmp_path: Path) -> None:
    trained(tmp_path / "whole", 3)
    trained(tmp_path / "cut", 3, stop=3)
    trained(tmp_path / "cut", 3, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    shutil.rmtree(tmp_path / "whole")
    trained(tmp_path / "whole", 2)
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_styles_are_files_or_folders(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    for name in ("b.safetensors", "a.safetensors"):
        style(1).save(tmp_path / "some" / name)
    style(2).save(tmp_path / "one.safetensors")
    found = styles.files([str(tmp_path / "some"), str(tmp_path / "one.safetensors")])
    assert [file.name for file in found] == ["a.safetensors", "b.safetensors", "one.safetensors"]
    assert styles.digests([]) == {}
    before = styles.digests([str(tmp_path / "one.safetensors")])
    style(3).save(tmp_path / "one.safetensors")
    assert styles.digests([str(tmp_path / "one.safetensors")]) != before
    (tmp_path / "empty").mkdir()
    for place in ("empty", "none.safetensors", "one.ckpt"):
        with pytest.raises(UsageError, match="There is no style at"):
            styles.files([str(tmp_path / place)])


def test_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    style(1).save(tmp_path / "toy.safetensors")
    pipe = loading.open_pipeline("tiny-image", device="cpu", quiet=True)
    with pytest.raises(ModelError, match="is for a pipeline's toy"):
        styles.put_on(pipe, pipe.transformer, [str(tmp_path / "toy.safetensors")])


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("pairs", {"composable": "x"}, "pairs learns from data that were made without a style"),
        ("dmd-gan", {"composable": "x"}, "dmd-gan learns from data"),
        ("lcm", {"composable": "x", "full": True}, "leave full out"),
        ("lcm", {"student.merge": True}, "merge puts base_lora"),
        ("medusa", {"composable": "x"}, "medusa trains a text model"),
        ("medusa", {"student.attention": "radial"}, "medusa trains a text model"),
        ("lcm", {"student.attention": "teacache"}, "is no sparse attention"),
        ("lcm", {"student.attention": "radical"}, "Unknown recipe 'radical'"),
    ],
)
def test_what_does_not_go_together(method: str, given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_config(method, None, {"model": "tiny-flux", **given})


def test_a_configuration_is_what_it_was_written_as() -> None:
    config = load_config("lcm", None, {"model": "x", "student.attention": "radial:min_tokens=0", "composable": "a"})
    assert config.student.styles == ("a",) and config.student.attention is not None
    assert type(config).model_validate(config.model_dump(mode="json")) == config



def test_a_chain_says_which_stage_takes_no_styles(tmp_path: Path) -> None:
    file = tmp_path / "chain.yaml"
    stages = "stages: [{method: {kind: lcm}}, {method: {kind: pairs}}]"
    file.write_text(f"model: tiny-flux\n{stages}\nstudent: {{styles: [a.safetensors]}}\n")
    with pytest.raises(UsageError, match=r"stage 2 \(pairs\): pairs learns from data that were made without a style"):
        load_chain(file)
    file.write_text("model: tiny-flux\nstages: [{method: {kind: dcgen, autoencoder: x}}]\n")
    with pytest.raises(UsageError, match="dcgen makes another model"):
        load_chain(file)
