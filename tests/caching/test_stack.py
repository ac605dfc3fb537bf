"""Block reuse without a model: decisions, histories and bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse, StackState
from hasten.drift import Drift
from hasten.forecast import Hold, Polynomial
from hasten.step import Step
from tests.contract import seeded, steps


def at(index: int, branch: int = 0, total: int = 20) -> Step:
    return Step(index, total, 1 - index / total, branch)


def compute(state: StackState, step: Step, lead: Tensor, residual: Tensor) -> bool:
    """One pass of a single-stream network; True when its blocks were skipped."""
    if state.decide(step, [lead], [lead.shape]):
        return True
    state.observe_lead(step, [lead], [lead.shape])
    state.observe(step, 0, [residual])
    return False


def test_skips_while_the_lead_stands_still() -> None:
    state = StackReuse(rule=Drift(limit=0.1, accumulate=False, warmup=0.0)).start()
    leads = [seeded(0, 4) * scale for scale in (1.0, 1.05, 1.08, 1.2, 1.25, 2.0)]
    assert [compute(state, at(i), lead, lead) for i, lead in enumerate(leads)] == [
        False, True, True, False, True, False,
    ]  # fmt: skip


def test_the_reference_is_the_last_computed_step() -> None:
    """Many small moves add up against a reference that does not creep along."""
    state = StackReuse(rule=Drift(limit=0.1, accumulate=False, warmup=0.0)).start()
    skipped = [compute(state, at(i), seeded(0, 4) * 1.03**i, seeded(1, 4)) for i in range(9)]
    assert skipped == [False, True, True, True, False, True, True, True, False]


def test_estimate_is_the_forecast_of_each_stack_and_stream() -> None:
    state, run = StackReuse(rule=Every(interval=3, warmup=2), forecast=Polynomial(order=1)).start(), steps(20)
    for step in run[:2]:
        assert not state.decide(step, [seeded(0, 4)], [torch.Size([4])])
        state.observe_lead(step, [seeded(0, 4)], [torch.Size([4])])
        for site in (0, 1):
            state.observe(step, site, [seeded(site, 4) * step.time, seeded(site + 5, 2) + step.time])
    assert state.decide(run[2], [seeded(0, 4)], [torch.Size([4])])
    for site in (0, 1):
        first, second = state.estimate(run[2], site)
        torch.testing.assert_close(first, seeded(site, 4) * run[2].time)
        torch.testing.assert_close(second, seeded(site + 5, 2) + run[2].time)


def test_one_decision_per_step_and_own_history_per_branch() -> None:
    state = StackReuse(rule=Every(interval=2)).start()
    for branch in (0, 1):
        assert not compute(state, at(0, branch), seeded(0, 4), seeded(branch, 4))
    for branch in (0, 1):
        assert compute(state, at(1, branch), seeded(0, 4), seeded(9, 4))
        assert torch.equal(state.estimate(at(1, branch), 0)[0], seeded(branch, 4))
    assert not compute(state, at(1, 2), seeded(0, 4), seeded(2, 4)), "a branch without history computes"


@pytest.mark.parametrize("rule", [Every(interval=2), Drift(limit=9.0, accumulate=False, warmup=0.0)])
@pytest.mark.parametrize("where", ["lead", "residual"])
def test_not_a_number_is_not_reused(rule: Every | Drift, where: str) -> None:
    state, bad = StackReuse(rule=rule).start(), torch.full((4,), math.nan)
    lead, residual = (bad, seeded(1, 4)) if where == "lead" else (seeded(0, 4), bad)
    if where == "lead" and isinstance(rule, Every):
        pytest.skip("a rule without a signal does not look at the lead; its residual is then NaN too")
    assert not compute(state, at(0), lead, residual)
    assert not compute(state, at(1), seeded(0, 4), seeded(2, 4))
    assert compute(state, at(3), seeded(0, 4), seeded(3, 4))
    assert torch.equal(state.estimate(at(3), 0)[0], seeded(2, 4))


def test_another_shape_computes() -> None:
    state = StackReuse(rule=Every(interval=2)).start()
    assert not compute(state, at(0), seeded(0, 4), seeded(1, 4))
    assert not compute(state, at(1), seeded(0, 8), seeded(1, 8))
    assert compute(state, at(3), seeded(0, 8), seeded(1, 8))


def test_bytes_are_those_of_the_lead_and_the_residuals() -> None:
    state = StackReuse(rule=Every(interval=2), forecast=Hold()).start()
    for branch in (0, 1):
        compute(state, at(0, branch), seeded(0, 4).clone(), seeded(branch, 16))
    assert state.num_bytes() == 2 * (4 + 16) * 4
    state.forget()
    assert state.num_bytes() == 0
