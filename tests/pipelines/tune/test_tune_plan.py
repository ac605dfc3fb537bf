"""Schedules that a search on recordings finds: what they must keep to, whatever was recorded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.pipelines.tune.plan import FORECASTS, Plan, _some, _starts, best_plan, judged
from hasten.pipelines.tune.signals import Signals
from hasten.recipe import from_yaml


def recorded(seed: int, steps: int, guided: bool, width: int = 5) -> Signals:
    """A run whose outputs are smooth and of `width` numbers: cubics in time, each with a ripple."""
    draw = torch.Generator().manual_seed(seed)
    times = [1 - i / steps for i in range(steps)]
    t = torch.tensor(times, dtype=torch.float64)[:, None]
    curves = []
    for _ in range(2 if guided else 1):
        a = torch.randn(5, width, generator=draw, dtype=torch.float64)
        curves.append(sum(a[k] * t**k for k in range(4)) + 0.2 * torch.sin(9 * t + a[4]))
    values = torch.cat(curves)
    return Signals(times, [-1 / steps] * steps, values @ values.T, 3.0 if guided else None)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 16), st.data())
def test_a_plan_has_what_was_asked_for(seed: int, total: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, total))
    guided = data.draw(st.none() | st.integers(1, steps))
    runs = [recorded(seed + k, total, guided is not None) for k in range(2)]
    forecast, correct, order = data.draw(st.sampled_from(FORECASTS))
    plan = best_plan(runs, steps, guided, forecast, correct, order, rounds=1)
    assert len(plan.steps) == steps and 0 in plan.steps and max(plan.steps) < total
    if guided is None:
        assert plan.guided is None and plan.evaluations == steps
    else:
        assert plan.guided is not None and len(plan.guided) == guided and 0 in plan.guided and plan.guided <= plan.steps
        assert plan.evaluations == steps + guided
    assert plan.error == pytest.approx(judged(plan, runs)) and math.isfinite(plan.error)
    assert plan == best_plan(runs, steps, guided, forecast, correct, order, rounds=1), "deterministic"
    for start in _starts(total, steps, runs[0].times):
        begun = Plan(total, start, None if guided is None else _some(start, guided), forecast, correct, order)
        assert plan.error <= judged(begun, runs) * (1 + 1e-12), "never worse than what it began with"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 100), st.data())
def test_the_recipe_of_a_plan_computes_just_its_steps(seed: int, total: int, data: st.DataObject) -> None:
    steps = frozenset(data.draw(st.sets(st.integers(0, total - 1), min_size=1))) | {0}
    guided = frozenset(data.draw(st.sets(st.sampled_from(sorted(steps))))) | {0}
    plan = Plan(total, steps, guided, *FORECASTS[seed % len(FORECASTS)])
    recipe = plan.recipe()
    assert from_yaml(recipe.to_yaml()) == recipe
    assert recipe.reuse.rule.computed(total) == set(steps)  # type: ignore[union-attr]
    if guided == steps:
        assert recipe.guidance is None
    else:
        assert {round(share * (total - 1)) for share in recipe.guidance.at} == set(guided)  # type: ignore[union-attr]


def test_more_evaluations_are_nearer() -> None:
    runs = [recorded(k, 24, True) for k in range(2)]
    errors = [best_plan(runs, steps, steps, *FORECASTS[0]).error for steps in (4, 8, 16, 24)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-7


def test_a_search_that_is_out_of_time_gives_what_it_has() -> None:
    runs = [recorded(3, 20, True)]
    plan = best_plan(runs, 6, 3, *FORECASTS[0], until=lambda: True)
    assert len(plan.steps) == 6 and plan.guided is not None and len(plan.guided) == 3
    assert best_plan(runs, 6, 3, *FORECASTS[0]).error < plan.error


@pytest.mark.parametrize(("steps", "guided"), [(0, None), (13, None), (4, 5), (4, 0)])
def test_plans_that_do_not_fit_are_refused(steps: int, guided: int | None) -> None:
    with pytest.raises(ValueError, match="does not fit a run of 12"):
        best_plan([recorded(0, 12, True)], steps, guided, *FORECASTS[0])
