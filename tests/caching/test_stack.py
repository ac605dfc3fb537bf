"""Block reuse without a model: decisions, histories and bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.caching.rules import Every
from hasten.caching.spans import Chosen, Piece, RearThenFront
from hasten.caching.stack import ChosenTokens, StackReuse, StackState
from hasten.caching.stack_signals import Evidence
from hasten.caching.tokens import MovedTokens
from hasten.drift import Drift
from hasten.forecast import Hold, Polynomial
from hasten.step import Step
from tests.contract import seeded, steps


def at(index: int, branch: int = 0, total: int = 20) -> Step:
    return Step(index, total, 1 - index / total, branch)


def started(policy: StackReuse, *sizes: int) -> StackState:
    """A state that knows of lists of `sizes` blocks; one list of four by default."""
    state = policy.start()
    state.lay_out(sizes or (4,))
    return state


def compute(state: StackState, step: Step, lead: Tensor, residual: Tensor) -> bool:
    """One pass of a network; True when its blocks were skipped. The stream looks like the lead's residual."""
    if state.decide(step, Evidence([lead], [lead], lead)):
        return True
    for piece in state.wanted(step):
        state.observe(step, piece, [residual])
    return False


def estimate(state: StackState, step: Step) -> Tensor:
    (piece,) = state.pieces(step)
    return state.estimate(step, piece)[0]


def test_skips_while_the_lead_stands_still() -> None:
    state = started(StackReuse(rule=Drift(limit=0.1, accumulate=False, warmup=0.0)))
    leads = [seeded(0, 4) * scale for scale in (1.0, 1.05, 1.08, 1.2, 1.25, 2.0)]
    assert [compute(state, at(i), lead, lead) for i, lead in enumerate(leads)] == [
        False, True, True, False, True, False,
    ]  # fmt: skip


def test_the_reference_is_the_last_computed_step() -> None:
    """Many small moves add up against a reference that does not creep along."""
    state = started(StackReuse(rule=Drift(limit=0.1, accumulate=False, warmup=0.0)))
    skipped = [compute(state, at(i), seeded(0, 4) * 1.03**i, seeded(1, 4)) for i in range(9)]
    assert skipped == [False, True, True, True, False, True, True, True, False]


def test_a_step_at_which_nothing_can_stand_in_is_not_counted_as_skipped() -> None:
    """Nothing was learned at step 0 (the network changed a block's output in place), or it was no number."""
    for broken in (None, math.nan):
        state = started(StackReuse(rule=Drift(limit=0.5, accumulate=True, max_skips=2, warmup=0.0)))
        lead = seeded(0, 4)
        assert not state.decide(at(0), Evidence([lead], [lead], lead))
        if broken is not None:
            state.observe(at(0), state.wanted(at(0))[0], [lead * broken])
        assert not compute(state, at(1), lead * 1.3, lead)
        # Both skips are left, and of the limit only what was measured since step 1 is spent.
        assert [compute(state, at(i), lead * 1.3 * (1 + 0.2 * (i > 1)), lead) for i in (2, 3, 4)] == [True, True, False]


def test_a_branch_of_its_own_history_does_not_restart_the_count_of_the_others() -> None:
    """A new branch computes while the first one stands in: what that one has drifted stays on the account."""
    state = started(StackReuse(rule=Drift(limit=0.5, accumulate=True, max_skips=2, warmup=0.0)))
    lead = seeded(0, 4)
    assert not compute(state, at(0), lead, lead)
    assert compute(state, at(1), lead, lead) and not compute(state, at(1, branch=1), lead, lead)
    assert [compute(state, at(i), lead, lead) for i in (2, 3)] == [True, False]


def test_estimate_is_the_forecast_of_each_piece_and_stream() -> None:
    policy, run = StackReuse(rule=Every(interval=3, warmup=2), forecast=Polynomial(order=1)), steps(20)
    state, seen = started(policy, 3, 2), Evidence([seeded(0, 4)], [seeded(0, 4)])
    for step in run[:2]:
        assert not state.decide(step, seen)
        assert state.wanted(step) == (Piece(0, 1, 3), Piece(1, 0, 2))
        for piece in state.wanted(step):
            state.observe(step, piece, [seeded(piece.site, 4) * step.time, seeded(piece.site + 5, 2) + step.time])
    assert state.decide(run[2], seen)
    for piece in state.pieces(run[2]):
        first, second = state.estimate(run[2], piece)
        torch.testing.assert_close(first, seeded(piece.site, 4) * run[2].time)
        torch.testing.assert_close(second, seeded(piece.site + 5, 2) + run[2].time)


def test_a_span_that_moves_has_a_history_on_both_sides() -> None:
    policy = StackReuse(lead=0, span=RearThenFront(share=0.5, switch=0.5), rule=Every(interval=2))
    state, used = started(policy), []
    for index in range(20):
        value = torch.full((4,), float(index))
        if compute(state, at(index), seeded(0, 4), value):
            used += state.pieces(at(index))
            assert torch.equal(estimate(state, at(index)), value - 1), "the newest computed residual"
    assert used == [Piece(0, 2, 4)] * 5 + [Piece(0, 0, 2)] * 5
    assert list(state.branches[0].histories) == [Piece(0, 0, 2)], "what no later step leaves out is dropped"


def test_a_span_that_is_empty_at_a_step_computes() -> None:
    state = started(StackReuse(lead=0, span=Chosen(blocks=(9,)), rule=Every(interval=2)))
    assert not any(compute(state, at(i), seeded(0, 4), seeded(1, 4)) for i in range(8))
    assert state.num_bytes() == 0


def test_tokens_are_those_that_moved() -> None:
    policy = StackReuse(lead=0, rule=Every(interval=2), tokens=MovedTokens(early=0.5, late=0.5))
    state, entry = started(policy), seeded(0, 2, 6, 3)
    (piece,) = state.pieces(at(0))
    assert not state.decide(at(0), Evidence([entry], [], entry))
    assert state.choose(at(0), piece, entry) is None, "not before it is proved that tokens may run apart"
    state.apart = True
    first = state.choose(at(0), piece, entry)
    assert first is not None and first.tolist() == [0, 2, 4], "evenly spread, as nothing has moved yet"
    state.observe(at(0), piece, [seeded(1, 2, 6, 3)], ChosenTokens(first, seeded(2, 2, 3, 3)))
    chosen = state.chosen(at(1), piece, entry)
    assert chosen is not None and chosen.index is first
    assert state.num_bytes() == (2 * 6 * 3 * 2 + 2 * 3 * 3) * 4 + 3 * 8
    now = entry.clone()
    now[:, [1, 4, 5]] += 1.0
    picked = state.choose(at(2), piece, now)
    assert picked is not None and picked.tolist() == [1, 4, 5]


def test_a_signal_of_the_lead_needs_a_lead() -> None:
    with pytest.raises(ValueError, match="lead = 0 leaves none"):
        StackReuse(lead=0)


def test_one_decision_per_step_and_own_history_per_branch() -> None:
    state = started(StackReuse(rule=Every(interval=2)))
    for branch in (0, 1):
        assert not compute(state, at(0, branch), seeded(0, 4), seeded(branch, 4))
    for branch in (0, 1):
        assert compute(state, at(1, branch), seeded(0, 4), seeded(9, 4))
        assert torch.equal(estimate(state, at(1, branch)), seeded(branch, 4))
    assert not compute(state, at(1, 2), seeded(0, 4), seeded(2, 4)), "a branch without history computes"


@pytest.mark.parametrize(
    ("rule", "where"),
    [
        (Every(interval=2), "residual"),
        (Drift(limit=9.0, accumulate=False, warmup=0.0), "residual"),
        (Drift(limit=9.0, accumulate=False, warmup=0.0), "lead"),
    ],
)
def test_not_a_number_is_not_reused(rule: Every | Drift, where: str) -> None:
    """A rule without a signal does not look at the lead; where that is NaN its residual is NaN, too."""
    state, bad = started(StackReuse(rule=rule)), torch.full((4,), math.nan)
    lead, residual = (bad, seeded(1, 4)) if where == "lead" else (seeded(0, 4), bad)
    assert not compute(state, at(0), lead, residual)
    assert not compute(state, at(1), seeded(0, 4), seeded(2, 4))
    assert compute(state, at(3), seeded(0, 4), seeded(3, 4))
    assert torch.equal(estimate(state, at(3)), seeded(2, 4))


def test_another_shape_computes() -> None:
    state = started(StackReuse(rule=Every(interval=2)))
    assert not compute(state, at(0), seeded(0, 4), seeded(1, 4))
    assert not compute(state, at(1), seeded(0, 8), seeded(1, 8))
    assert compute(state, at(3), seeded(0, 8), seeded(1, 8))


@pytest.mark.parametrize(("rule", "lead"), [(Drift(accumulate=False), 4), (Every(interval=2), 0)])
def test_bytes_are_those_of_the_residuals_and_of_a_lead_that_is_watched(rule: Drift | Every, lead: int) -> None:
    state = started(StackReuse(rule=rule, forecast=Hold()))
    for branch in (0, 1):
        compute(state, at(0, branch), seeded(0, 4).clone(), seeded(branch, 16))
    assert state.num_bytes() == 2 * (lead + 16) * 4
    state.forget()
    assert state.num_bytes() == 0
