"""The loop of all methods: resumed bit for bit, the same however a batch is cut, honest about what does not move."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, Method, MethodState
from hasten.distill.methods.pairs import Pairs
from hasten.errors import ResumeError, UsageError
from tests.distill.toys import trainer


class Critic(Method):
    """Trains a critic twice as often as the student, and keeps an average: all that the loop must do."""

    kind: ClassVar[str] = "test-critic"
    trains: ClassVar[tuple[str, ...]] = ("student", "critic", "target")
    averages: ClassVar[tuple[str, ...]] = ("target",)

    def start(self, facts: Facts) -> MethodState:
        return _CriticState(facts)


class _CriticState(MethodState):
    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.head = torch.nn.Linear(5, 1)

    def phases(self, step: int) -> tuple[str, ...]:
        return ("student", "critic") if step % 2 == 0 else ("critic",)

    def heads(self, role: str) -> list[tuple[str, torch.nn.Module]]:
        return [("score", self.head)] if role == "critic" else []

    def decay(self, role: str) -> float:
        return 0.9

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None
        tau = draw.uniform(f"{phase}.tau") * 1.5
        x = batch.x0 + draw.normal(f"{phase}.noise", batch.x0)
        if phase == "critic":
            made = kept["made"] if step % 2 == 0 else x
            rows = self.head(self.roles["critic"].velocity(made, tau, batch.condition)).square().flatten()
            return Loss(rows, {"size": rows.max()})
        made = self.roles["student"].data(x, tau, batch.condition)
        with torch.no_grad():
            aim = self.roles["target"].data(x, tau, batch.condition) + batch.x0
        return Loss((made - aim).square().mean(1), keep={"made": made.detach()})


def weights(out: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    files = sorted((out / "latest").glob("*/*.safetensors"))
    return {f"{f.parent.name}/{f.stem}/{k}": v for f in files for k, v in load_file(f).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("method", [Pairs(), Critic()], ids=lambda m: m.kind)
def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path: Path, method: Method, full: bool) -> None:
    assert trainer(method, tmp_path / "whole", full=full).fit() == 6
    trainer(method, tmp_path / "cut", full=full).fit(stop_after=3)
    shutil.copytree(tmp_path / "cut", tmp_path / "none")
    assert trainer(method, tmp_path / "cut", full=full).fit(resume=True) == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "none"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(6))


@pytest.mark.parametrize("method", [Pairs(), Critic()], ids=lambda m: m.kind)
def test_a_batch_may_be_cut_into_parts(tmp_path: Path, method: Method) -> None:
    trainer(method, tmp_path / "one").fit()
    trainer(method, tmp_path / "four", accumulate=4).fit()
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    assert one.keys() == four.keys()
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_one_base_and_copies_hold_what_they_should(tmp_path: Path) -> None:
    shared, copies = trainer(Critic(), tmp_path / "a"), trainer(Critic(), tmp_path / "b", full=True)
    networks = {id(role.host.network) for role in shared.roles.values()}
    assert len(networks) == 1
    assert len({id(role.host.network) for role in copies.roles.values()}) == 4
    before = {name: p.clone() for name, p in shared.roles["teacher"].host.network.named_parameters() if "lora" not in name}
    shared.fit()
    after = dict(shared.roles["teacher"].host.network.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_average_follows_the_student(tmp_path: Path) -> None:
    done = trainer(Critic(), tmp_path / "a", average=0.5)
    done.fit()
    student = done.players["student"]
    for name, value in student.average.items():
        assert not torch.equal(value, student.parameters[name])
    target, own = done.roles["target"].parameters(), done.roles["student"].parameters()
    gap = sum(float((a - b).abs().sum()) for a, b in zip(target.values(), own.values(), strict=True))
    assert gap > 0
    assert all(p.grad is None for p in target.values())


class Deaf(Pairs):
    """A loss that reaches one of the student's layers only."""

    kind: ClassVar[str] = "test-deaf"

    def start(self, facts: Facts) -> MethodState:
        return _DeafState(facts)


class _DeafState(MethodState):
    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        last = self.roles["student"].host.network.get_submodule("last")
        weight: Tensor = last.weight  # type: ignore[assignment]
        return Loss(weight.square().mean().expand(len(batch)))


def test_weights_that_never_move_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="3 of 4 weights of role 'student' have not moved in 6 steps, the first: first"):
        trainer(Deaf(), tmp_path / "a", full=True).fit()


def test_what_cannot_be_resumed_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no complete checkpoint"):
        trainer(Pairs(), tmp_path / "a").fit(resume=True)
    trainer(Critic(), tmp_path / "a").fit(stop_after=2)
    with pytest.raises(ResumeError, match="was trained by"):
        trainer(Pairs(), tmp_path / "a").fit(resume=True)
    (tmp_path / "a" / "latest" / "critic" / "optimizer.safetensors").unlink()
    with pytest.raises(ResumeError, match=r"critic/optimizer.safetensors is missing"):
        trainer(Critic(), tmp_path / "a").fit(resume=True)


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    trainer(Pairs(), tmp_path / "a", lr=1e-2).fit(stop_after=2)
    broken = trainer(Pairs(), tmp_path / "a", lr=1e-2)
    store = broken.data
    store.x0[:] = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match="loss, gradient of pairs is not finite at step 2"):
        broken.fit(resume=True)
    assert json.loads((tmp_path / "a" / "latest" / "state.json").read_text())["step"] == 2


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="batch = 8 does not divide into 1 processes x 3 parts"):
        trainer(Pairs(), tmp_path / "a", accumulate=3).fit()


def test_draws_depend_on_row_and_purpose_alone() -> None:
    like = torch.zeros(4, 3)
    whole = Draw(1, 2, range(4)).normal("z", like)
    assert torch.equal(Draw(1, 2, [3, 1]).normal("z", like[:2]), whole[[3, 1]])
    assert len({float(Draw(s, t, [r]).uniform(p)) for s in (0, 1) for t in (0, 1) for r in (0, 1) for p in "ab"}) == 16
