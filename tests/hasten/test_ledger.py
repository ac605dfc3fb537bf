"""The ledger spends its tolerance, never more than it measured, and adapts to what it is told."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hasten.budget import COARSEST, FINEST, Budget
from hasten.caching.context import ContextReuse
from hasten.caching.deep import DeepReuse
from hasten.caching.modules import ModuleReuse
from hasten.caching.stack import StackReuse
from hasten.errors import RecipeError
from hasten.ledger import PATH, Ledger, LedgerState, _along, _before
from hasten.level import Level
from hasten.step import Step


def flow(total: int, shift: float = 3.0) -> list[Step]:
    """The steps of an Euler run on a flow with the given shift."""
    u = [1 - i / total for i in range(total + 1)]
    sigma = [shift * v / (1 + (shift - 1) * v) for v in u]
    return [
        Step(i, total, sigma[i], 0, sigma[i + 1] - sigma[i], Level(1 - sigma[i], sigma[i], (1.0, -sigma[i])))
        for i in range(total)
    ]


def run(rule: Ledger, steps: list[Step], roughness: float) -> tuple[list[int], LedgerState]:
    """Indices that were computed when a forecast over a distance h (angle) is off by roughness * h."""
    state, computed = rule.start([step.time for step in steps]), []
    node: float | None = None
    for step in steps:
        assert step.level is not None
        if state.skip(step, None):
            continue
        computed.append(step.index)
        state.learn(step, None if node is None else roughness * abs(step.level.angle - node))
        node = step.level.angle
    return computed, state


def test_a_smaller_tolerance_computes_more() -> None:
    steps = flow(50)
    counts = [len(run(Ledger(tolerance=t), steps, 2.0)[0]) for t in (0.005, 0.02, 0.08, 0.3)]
    assert counts == sorted(counts, reverse=True) and counts[0] > 2 * counts[-1]


def test_a_rougher_model_computes_more() -> None:
    counts = [len(run(Ledger(), flow(50), roughness)[0]) for roughness in (0.01, 3.0, 30.0)]
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[2]


def test_steps_are_added_where_the_model_is_rough() -> None:
    steps = flow(50)
    smooth, _ = run(Ledger(tolerance=0.1), steps, 0.01)
    state, computed = Ledger(tolerance=0.1).start([s.time for s in steps]), []
    node = None
    for step in steps:
        assert step.level is not None
        if not state.skip(step, None):
            computed.append(step.index)
            rough = 20.0 if 15 <= step.index < 35 else 0.01
            state.learn(step, None if node is None else rough * abs(step.level.angle - node))
            node = step.level.angle
    assert [i for i in computed if i < 15] == [i for i in smooth if i < 15]
    assert len([i for i in computed if 20 <= i < 35]) >= 2 * len([i for i in smooth if 20 <= i < 35])


@settings(max_examples=60, deadline=None)
@given(tolerance=st.floats(0.002, 0.5), roughness=st.floats(0.01, 30.0), total=st.integers(1, 120))
def test_ledger_invariants(tolerance: float, roughness: float, total: int) -> None:
    rule = Ledger(tolerance=tolerance)
    computed, state = run(rule, flow(total), roughness)
    assert computed[0] == 0, "the first step has nothing to stand in for it"
    assert len(computed) >= min(total, 0.8 * rule.planned - 1), "rounding costs a fifth of the plan at most"
    gaps = [b - a for a, b in zip(computed, [*computed[1:], total], strict=True)]
    assert max(gaps) <= max(1, math.ceil(1.82 * total / rule.planned) + 1), "no gap is longer than the plan's steepest"
    # With a roughness that does not change, predictions are exact: only the first gap, made before anything is
    # measured, and the small change that is always there (LEAST) can go beyond the tolerance.
    opening = sum(_effects(flow(total))[1 : gaps[0]]) * roughness * math.pi / 2
    assert state.estimate <= tolerance * 1.5 + opening


def _effects(steps: list[Step]) -> list[float]:
    """How far each step walks on the unit circle, times what an output counts for there."""
    angles = [step.level.angle for step in steps if step.level is not None] + [0.0]
    counts = [abs(step.level.velocity[1]) for step in steps if step.level is not None and step.level.velocity]
    return [count * (a - b) for count, a, b in zip(counts, angles, angles[1:], strict=False)]


@given(total=st.integers(20, 200), tolerance=st.floats(0.01, 0.3))
def test_planned_gaps_grow_smoothly(total: int, tolerance: float) -> None:
    """After the first gap none is longer than one and a half times the one before it and one step."""
    computed, _ = run(Ledger(tolerance=tolerance), flow(total), 1e-9)
    gaps = [b - a for a, b in itertools.pairwise(computed)]
    assert all(b <= 1.5 * a + 1 for a, b in itertools.pairwise(gaps)), gaps


@given(position=st.floats(0, 1))
def test_the_path_is_inverted(position: float) -> None:
    assert _along(_before(position), PATH) == pytest.approx(position, abs=1e-9)


def test_without_a_measured_error_nothing_but_the_first_gap_is_skipped() -> None:
    steps = flow(50)
    state = Ledger().start([step.time for step in steps])
    skipped = [step.index for step in steps if _skip_untold(state, step)]
    assert skipped == [1, 2]


def _skip_untold(state: LedgerState, step: Step) -> bool:
    skips = state.skip(step, None)
    if not skips:
        state.learn(step, None)
    return skips


def test_an_error_that_is_not_finite_is_not_believed() -> None:
    steps = flow(20)
    state = Ledger().start([step.time for step in steps])
    for step in steps[:3]:
        if not state.skip(step, None):
            state.learn(step, float("nan") if step.index else None)
    assert state.rho is None and math.isfinite(state.estimate)


def test_budget_is_one_tolerance_in_three_words() -> None:
    assert Budget(latent_error=0.02).tolerance == 0.02
    assert Budget(psnr=32).tolerance == pytest.approx(0.1)
    assert Budget(quality=0).tolerance == pytest.approx(COARSEST)
    assert Budget(quality=1).tolerance == pytest.approx(FINEST)
    assert Budget(psnr=40).tolerance < Budget(psnr=30).tolerance


@pytest.mark.parametrize("wrong", [{}, {"psnr": 30, "quality": 0.5}, {"psnr": 3}, {"latent_error": 0}, {"quality": 2}])
def test_budget_refuses_none_several_and_nonsense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Budget(**wrong)


def test_budgets_are_refused_where_nothing_measures_them() -> None:
    for policy in (StackReuse, ModuleReuse, DeepReuse, ContextReuse):
        field = "self_attention" if policy is ModuleReuse else "rule"
        with pytest.raises((ValidationError, RecipeError)):
            policy(**{field: Ledger()})


def under_way(rho: float) -> tuple[LedgerState, Step]:
    """A state whose last computed step is 20 of 50 and that planned a long gap; and the step after."""
    steps = flow(50)
    state = Ledger(tolerance=0.05).start([step.time for step in steps])
    state.skip(steps[20], None)
    state.learn(steps[20], None)
    state.rho, state.due = rho, 40
    return state, steps[21]


def test_a_skip_costs_its_error_times_the_way_it_goes() -> None:
    """rho times the distance to the last computed step, times the angle walked, times |b| of the velocity."""
    state, step = under_way(0.3)
    before, after = flow(50)[20].level, flow(50)[22].level
    assert step.level is not None and before is not None and after is not None and step.level.velocity is not None
    assert state.skip(step, None)
    distance, walked = before.angle - step.level.angle, step.level.angle - after.angle
    assert state.estimate == pytest.approx(0.3 * distance * walked * abs(step.level.velocity[1]))
    assert abs(step.level.velocity[1]) < 0.9, "or the factor would not be seen"


def test_what_is_spent_buys_nothing_more() -> None:
    state, step = under_way(1.0)
    gaps = (1 - _before(step.index / step.total)) * state.rule.planned + 1
    rho = 0.5 * state.rule.tolerance / math.sqrt(gaps) / state._cost(step)  # half of what this gap may cost
    assert under_way(rho)[0].skip(step, None)
    state, step = under_way(rho)
    state.spent = 0.9 * state.rule.tolerance**2
    assert not state.skip(step, None)


@pytest.mark.parametrize(("measured", "believed"), [(9.0, 9.0), (1.0, 2.0)])
def test_rising_errors_are_believed_at_once_and_falling_ones_by_half(measured: float, believed: float) -> None:
    state, step = under_way(4.0)
    before = flow(50)[20].level
    assert step.level is not None and before is not None
    state.learn(step, measured * (before.angle - step.level.angle))
    assert state.rho == pytest.approx(believed)
