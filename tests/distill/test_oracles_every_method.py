"""What holds for every consistency method on exact roles, in float64: rows, gradients, ends, who is aimed at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Method, MethodState
from hasten.distill.methods.guidance import Guidance
from hasten.distill.methods.lcm import LCM, LCMLoRA
from hasten.distill.methods.meanflow import MeanFlow
from hasten.distill.methods.progressive import Progressive
from hasten.distill.methods.scm import SCM
from hasten.distill.network.paths import Flow, turned
from tests.distill.gaussians import Mixture, batch, roles
from tests.distill.oracles import facts, rows_of

METHODS: tuple[Method, ...] = (
    LCM(scale=(1, 3)), LCMLoRA(scale=(1, 3)), SCM(scale=2, warmup=2, top=0.3), SCM(scale=(1, 3), told=True, adaptive=False),
    MeanFlow(scale=2, whole=0.2), Guidance(scale=(1, 3), told=True), Progressive(first=2),
)  # fmt: skip
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)


def wrong(method: Method) -> tuple[MethodState, Any]:
    """The method on roles that have something to learn."""
    made = roles(Mixture(), Flow(), None, names=method.trains)
    return method.start(facts(made)), made


@each_method
def test_rows_do_not_know_their_neighbours(method: Method) -> None:
    """Another order of the rows, or another batch around them, gives the same losses."""
    state, _ = wrong(method)
    rows = batch()
    whole = rows_of(state, rows)
    assert whole.shape == (7,) and bool(whole.isfinite().all()) and float(whole.std()) > 0
    index = torch.tensor([4, 1, 6])
    assert rows.x0 is not None and rows.z is not None
    some = Batch(rows.condition.rows(index), rows.empty, rows.x0[index], rows.z[index], rows.shape)
    part = state.loss("student", some, Draw(0, 5, index.tolist()), 5, {}).rows
    torch.testing.assert_close(part, whole[index], rtol=1e-9, atol=1e-12)


@each_method
def test_gradients_reach_the_student_alone(method: Method) -> None:
    state, made = wrong(method)
    rows_of(state, batch()).sum().backward()
    for name, role in made.items():
        gradients = [p.grad for p in role.parameters().values() if p is not role.host.network.time_embed.linear_2.weight]
        some = any(g is not None and bool(g.any()) for g in gradients)
        assert some == (name == "student"), name


@each_method
def test_the_data_are_their_own_end(method: Method) -> None:
    """At tau = 0 whatever network gives x itself."""
    x = batch().x0
    assert x is not None
    zero, condition = torch.zeros(len(x), dtype=torch.float64), batch().condition
    student = wrong(method)[0].student()
    velocity = (
        student.toward(x, zero, zero, condition) if hasattr(student, "toward") else student.velocity(x, zero, condition)
    )
    assert torch.equal(turned(x, velocity, zero), x)


def test_teachers_and_targets_are_who_they_should_be() -> None:
    """LCM aims at its target, LCM-LoRA at the student; progressive at the guided teacher first, then at `before`."""

    def moved(method: Method, name: str, step: int) -> float:
        made = roles(Mixture(), Flow(), None, names=method.trains)
        state = method.start(facts(made, 8))
        before = rows_of(state, batch(), step).detach()
        with torch.no_grad():
            made[name].host.network.off += 0.1  # type: ignore[operator]
        return float((rows_of(state, batch(), step).detach() - before).abs().max())

    lcm = LCM(scale=(1, 3), huber=0)
    assert moved(lcm, "target", 0) > 1e-3 and moved(lcm, "teacher", 0) > 1e-4
    halving = Progressive(scale=2, first=2)
    assert moved(halving, "teacher", 0) > 1e-3 and moved(halving, "before", 0) == 0
    assert moved(halving, "teacher", 7) == 0 and moved(halving, "before", 7) > 1e-3
