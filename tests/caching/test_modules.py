"""Policies that reuse what is inside a network, on tensors alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hasten.caching.deep import DeepReuse
from hasten.caching.extrapolation import Dynamic, Taylor, taylor_weights
from hasten.caching.histories import Histories, key_of
from hasten.caching.modules import ModuleReuse
from hasten.caching.rules import Every, Window
from hasten.drift import Drift
from hasten.errors import RecipeError
from hasten.forecast import Hold, Polynomial
from hasten.step import Step
from tests.contract import seeded, steps


def test_window_computes_outside_and_every_interval_inside() -> None:
    """Pyramid attention broadcast at 50 steps: timesteps 800 to 100 are the steps 10 to 44."""
    computed = Window(interval=4).computed(50)
    assert computed == {*range(10), *range(12, 45, 4), *range(45, 50)}


def test_every_family_has_its_own_rule_and_branches_follow() -> None:
    policy = ModuleReuse(self_attention=Every(interval=2), cross_attention=Every(interval=4))
    state, answers = policy.start(), []
    for step in steps(8):
        for branch in (0, 1):
            now = Step(step.index, 8, step.time, branch)
            state.begin(now)
            found = {}
            for family in ("self_attention", "cross_attention", "feed_forward"):
                y = state.answer(now, family, family, ("key",))  # type: ignore[arg-type]
                found[family] = y is not None
                if y is None:
                    state.observe(now, family, ("key",), [seeded(branch, 4)])
                else:
                    assert torch.equal(y[0], seeded(branch, 4)), "another branch's value"
            answers.append(found)
    assert [a["self_attention"] for a in answers[::2]] == [False, True] * 4
    assert [a["cross_attention"] for a in answers[1::2]] == [False, True, True, True] * 2
    assert not any(a["feed_forward"] for a in answers)


@pytest.mark.parametrize("rules", [{"self_attention": Drift()}, {"feed_forward": Drift(), "self_attention": None}])
def test_rules_that_need_a_signal_are_refused(rules: dict[str, Any]) -> None:
    with pytest.raises((RecipeError, ValueError), match="compares a signal"):
        ModuleReuse(**rules)


def test_no_rule_at_all_is_refused() -> None:
    with pytest.raises((RecipeError, ValueError), match="at least one of"):
        ModuleReuse(self_attention=None)


def test_clock_decides_the_axis_of_the_forecast() -> None:
    """Values linear in the step index are continued in it, whatever the times are."""
    for clock, exact in (("step", True), ("time", False)):
        policy = ModuleReuse(self_attention=Every(interval=3, warmup=2), forecast=Polynomial(order=1), clock=clock)
        state, run = policy.start(), steps(10)
        for step in run[:3]:
            state.begin(step)
            y = state.answer(step, "a", "self_attention", ("key",))
            if y is None:
                state.observe(step, "a", ("key",), [torch.full((3,), float(step.index))])
        assert y is not None and torch.allclose(y[0], torch.full((3,), 2.0)) == exact


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_branch_that_was_not_finite_is_forgotten(bad: float) -> None:
    held = Histories(Hold())
    for branch, value in ((0, 1.0), (1, bad)):
        held.store(branch, "a", ("key",), 1.0, [torch.full((3,), value)])
        held.check(branch, [torch.full((2,), 0.0), torch.full((2,), value)])
    assert held.drop_poisoned() == [1] and held.drop_poisoned() == []
    assert held.estimate(0, "a", ("key",), 0.5) is not None
    assert held.estimate(1, "a", ("key",), 0.5) is None


def test_histories_are_copies_and_counted() -> None:
    held, y = Histories(Hold()), seeded(0, 3, 4)
    held.store(0, "a", key_of(y), 1.0, [y, y[0]])
    y.zero_()
    found = held.estimate(0, "a", key_of(y), 0.5)
    assert found is not None and torch.equal(found[0], seeded(0, 3, 4)) and torch.equal(found[1], seeded(0, 3, 4)[0])
    assert held.num_bytes() == (12 + 4) * 4
    assert held.estimate(0, "a", key_of(y.double()), 0.5) is None
    held.keep({"b"})
    assert held.num_bytes() == 0


def test_deep_feature_per_branch_and_key() -> None:
    state = DeepReuse(rule=Every(interval=2)).start()
    for branch in (0, 1):
        assert state.answer(Step(0, 9, 1.0, branch), ("key",)) is None
        state.observe(Step(0, 9, 1.0, branch), ("key",), seeded(branch, 4))
    for branch in (0, 1):
        found = state.answer(Step(1, 9, 0.9, branch), ("key",))
        assert found is not None and torch.equal(found, seeded(branch, 4))
    assert state.answer(Step(1, 9, 0.9, 0), ("other",)) is None
    assert state.answer(Step(2, 9, 0.8, 0), ("key",)) is None


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylor_is_what_diffusers_computes(order: int) -> None:
    """The peer's own state on an irregular grid of step indices."""
    taylorseer = pytest.importorskip("diffusers.hooks.taylorseer_cache")
    peer = taylorseer.TaylorSeerState(taylor_factors_dtype=torch.float32, max_order=order)
    ours, computed = Taylor(order=order).start(), (0, 1, 2, 4, 5, 9)
    for step in range(13):
        peer.current_step = step
        if step in computed:
            value = seeded(step, 5)
            peer.update((value,))
            ours.store(float(step), value)
        else:
            (expected,) = peer.predict()
            torch.testing.assert_close(ours.estimate(float(step)), expected, rtol=1e-4, atol=1e-4)


def test_taylor_of_order_two_misses_a_parabola_that_the_polynomial_hits() -> None:
    state, exact = Taylor(order=2).start(), Polynomial(order=2).start()
    for t in (0.0, 1.0, 2.0):
        state.store(t, torch.tensor(t * t))
        exact.store(t, torch.tensor(t * t))
    assert float(exact.estimate(5.0)) == pytest.approx(25.0)
    assert float(state.estimate(5.0)) == pytest.approx(22.0)  # 4 + 3 * 3 + 2 * 9 / 2
    assert taylor_weights([0.0, 1.0], 3.0) == pytest.approx([-2.0, 3.0])


def test_dynamic_weight_grows_as_the_noise_falls() -> None:
    state = Dynamic(first=0.2, last=0.8).start()
    state.store(0.9, torch.tensor(1.0))
    state.store(0.6, torch.tensor(3.0))
    for t, weight in ((0.5, 0.5), (0.25, 0.65), (0.0, 0.8)):
        assert float(state.estimate(t)) == pytest.approx(3.0 + 2.0 * weight)
