"""Whole-network reuse on ordinary differential equations whose solution is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hasten.caching.network import NetworkReuse, NetworkState
from hasten.caching.rules import Every
from hasten.caching.signals import OutputChange, Signal
from hasten.drift import Drift
from hasten.forecast import Forecast, Hold, Polynomial
from hasten.level import Level
from hasten.step import Step
from tests.contract import PartContract, parts, seeded, steps

Field = Callable[[Tensor, float], Tensor]


class TestEverySignal(PartContract):
    family = Signal

    @pytest.fixture(params=parts(Signal))
    def part(self, request: pytest.FixtureRequest) -> Signal:
        return request.param

    def test_unknown_at_first_zero_when_nothing_moves(self, part: Signal) -> None:
        state, x, run = part.start(), seeded(0, 1, 4, 4), leveled(8)
        assert state.measure(run[0], x) is None
        state.observe(run[0], x, seeded(1, 1, 4, 4))
        for number in (1, 2, 3):
            state.measure(run[number], seeded(number + 1, 1, 4, 4))
            state.observe(run[number], seeded(number + 1, 1, 4, 4), seeded(number + 5, 1, 4, 4))
        last = state.measure(run[3], seeded(4, 1, 4, 4))
        moved = state.measure(run[4], seeded(5, 1, 4, 4))
        assert moved is not None and moved.ndim == 0 and bool(torch.isfinite(moved))
        if part.signed:
            assert last is None and -1 <= float(moved) <= 1
        else:
            assert last is not None and float(last) < 1e-6 < float(moved)
        assert state.measure(run[5], seeded(4, 2, 4, 4)) is None, "another shape is no small change"

    def test_what_is_held_is_bounded_and_counted(self, part: Signal) -> None:
        state = part.start()
        for step in leveled(20):
            state.measure(step, seeded(step.index, 1, 4, 4))
            state.observe(step, seeded(step.index, 1, 4, 4), seeded(step.index + 50, 1, 4, 4))
        assert 1 <= len(state.tensors()) <= 6 and all(tensor.numel() == 16 for tensor in state.tensors())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_a_number_in_every_precision_and_shape(self, part: Signal, dtype: torch.dtype) -> None:
        for shape in ((2, 4, 4, 4), (1, 4, 3, 4, 6), (2, 6, 4)):
            state, found = part.start(), None
            for step in leveled(6):
                found = state.measure(step, seeded(step.index, *shape, dtype=dtype))
                state.observe(step, seeded(step.index, *shape, dtype=dtype), seeded(step.index + 50, *shape, dtype=dtype))
            assert found is not None and bool(torch.isfinite(found))


def leveled(total: int) -> list[Step]:
    """Steps of a flow that say how noisy they are."""
    return [replace(step, level=Level(1 - step.time, step.time, (1.0, -step.time))) for step in steps(total)]


def solve(policy: NetworkReuse, field: Field, start: Tensor, total: int = 30) -> tuple[Tensor, NetworkState]:
    """Euler's method with the policy in between, as the gate calls it."""
    state, x = policy.start([step.time for step in steps(total)]), start
    for step in steps(total):
        answer = state.answer(step, x) if state.decide(step, x) else None
        v = answer[0] if answer is not None else state.observe(step, x, [field(x, step.time)])[0]
        assert step.weight is not None
        x = x + step.weight * v
    return x, state


def policy(*, correct: int, forecast: Forecast | None = None, interval: int = 3) -> NetworkReuse:
    return NetworkReuse(rule=Every(interval=interval, warmup=3), forecast=forecast or Hold(), correct=correct)


ALWAYS = NetworkReuse(rule=Every(interval=1))


@pytest.mark.parametrize("forecast", [Hold(), Polynomial(order=1), Polynomial(order=2)], ids=["hold", "one", "two"])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_corrected_run_is_exact_on_polynomials_of_time(degree: int, forecast: Forecast) -> None:
    def field(x: Tensor, time: float) -> Tensor:
        return seeded(1, 8) * sum((k + 1) * (-time) ** k for k in range(degree + 1))

    # 30 steps, one in three: the last gap is closed by a computed step only if the run ends on one.
    full, _ = solve(ALWAYS, field, seeded(0, 8), total=30)
    corrected, _ = solve(policy(correct=3, forecast=forecast), field, seeded(0, 8), total=30)
    plain, _ = solve(policy(correct=0, forecast=forecast), field, seeded(0, 8), total=30)
    assert 29 in Every(interval=3, warmup=3).computed(30)
    torch.testing.assert_close(corrected, full, rtol=1e-4, atol=1e-4)
    if degree > getattr(forecast, "order", 0):
        assert float((plain - full).norm()) > 30 * float((corrected - full).norm())


@pytest.mark.parametrize("forecast", [Hold(), Polynomial(order=1)], ids=["hold", "one"])
def test_corrected_run_is_nearer_on_a_linear_equation(forecast: Forecast) -> None:
    matrix = seeded(2, 6, 6) * 0.5

    def field(x: Tensor, time: float) -> Tensor:
        return x @ matrix

    full, _ = solve(ALWAYS, field, seeded(0, 1, 6))
    off = [float((solve(policy(correct=c, forecast=forecast), field, seeded(0, 1, 6))[0] - full).norm()) for c in (0, 3)]
    assert off[1] < 0.6 * off[0]


def test_without_weights_nothing_is_corrected() -> None:
    state = policy(correct=3).start()
    for step in steps(9):
        blind = Step(step.index, step.total, step.time, 0, None)
        if not state.decide(blind, seeded(0, 4)):
            y = seeded(step.index, 4)
            assert torch.equal(state.observe(blind, seeded(0, 4), [y])[0], y)


def test_not_a_number_is_forgotten() -> None:
    state, x, run = policy(correct=3).start(), seeded(0, 4), steps(30)
    answers: list[tuple[int, Tensor]] = []
    for step in run:
        answer = state.answer(step, x) if state.decide(step, x) else None
        y = torch.full((4,), math.nan) if step.index == 8 else seeded(step.index, 4)
        answers.append((step.index, answer[0] if answer is not None else state.observe(step, x, [y])[0]))
    bad = [index for index, value in answers if not bool(torch.isfinite(value).all())]
    assert bad == [8]


@pytest.mark.parametrize("fault", ["poison", "shape"])
def test_a_step_at_which_nothing_can_stand_in_is_not_counted_as_skipped(fault: str) -> None:
    """Step 3 computes although the rule would skip: both skips in a row are left after it."""
    rule = Drift(limit=1e9, accumulate=True, max_skips=2, warmup=0.0, tail=0.0)
    state, skipped = NetworkReuse(rule=rule, signal=OutputChange()).start(), []
    for step in steps(12):
        x = seeded(step.index, 1, 8 if fault == "shape" and step.index >= 4 else 4)
        if state.decide(step, x):
            assert state.answer(step, x) is not None
            skipped.append(step.index)
        else:
            bad = fault == "poison" and step.index == 3
            state.observe(step, x, [torch.full_like(x, math.nan) if bad else seeded(step.index + 20, *x.shape)])
    assert 4 not in skipped and {5, 6} <= set(skipped), skipped


@pytest.mark.parametrize("changed", [seeded(0, 2, 4), seeded(0, 1, 4).double(), seeded(0, 1, 8)])
def test_another_shape_or_dtype_has_no_history(changed: Tensor) -> None:
    state, run = policy(correct=3).start(), steps(30)
    for step in run[:6]:
        if not state.decide(step, seeded(0, 1, 4)):
            state.observe(step, seeded(0, 1, 4), [seeded(step.index, 1, 4)])
    assert state.answer(run[6], seeded(0, 1, 4)) is not None
    assert state.answer(run[6], changed) is None
    assert state.observe(run[6], changed, [changed])[0] is changed
    again = state.answer(run[7], changed)
    assert again is not None and again[0].shape == changed.shape and again[0].dtype == changed.dtype


def test_branches_share_nothing() -> None:
    state, x, run = NetworkReuse(rule=Every(interval=2)).start(), seeded(0, 4), steps(4)
    for branch in (0, 1):
        step = Step(0, 4, run[0].time, branch, run[0].weight)
        assert not state.decide(step, x)
        state.observe(step, x, [seeded(branch + 1, 4)])
    for branch in (0, 1):
        answer = state.answer(Step(1, 4, run[1].time, branch), x)
        assert answer is not None and torch.equal(answer[0], seeded(branch + 1, 4))
    assert state.answer(Step(1, 4, run[1].time, 2), x) is None
    assert state.num_bytes() == 2 * 16
    state.forget()
    assert state.num_bytes() == 0


def test_residual_adds_the_present_input() -> None:
    old, new, y = seeded(0, 4), seeded(1, 4), seeded(2, 4)
    for of, expected in (("output", y), ("residual", y - old + new)):
        state = NetworkReuse(rule=Every(interval=2), of=of).start()
        state.observe(steps(4)[0], old, [y])
        answer = state.answer(steps(4)[1], new)
        assert answer is not None
        torch.testing.assert_close(answer[0], expected)


def test_the_hosts_tensor_is_not_kept() -> None:
    state, y = NetworkReuse(rule=Every(interval=2)).start(), seeded(0, 4)
    given = state.observe(steps(4)[0], seeded(1, 4), [y])[0]
    given.add_(100.0)
    answer = state.answer(steps(4)[1], seeded(1, 4))
    assert answer is not None and torch.equal(answer[0], seeded(0, 4))


def test_easycache_signal_against_a_hand_computation() -> None:
    """k = |y1 - y0| / |x1 - x0| = 6 / 2; then k |x2 - x1| / |y1| = 3 * 1 / 8 and k |x3 - x2| / |y1| = 3 * 0.5 / 8."""
    x = [torch.full((1, 2), value) for value in (0.0, 2.0, 3.0, 2.5)]
    state, run = OutputChange().start(), steps(4)
    for i, y in enumerate((2.0, 8.0)):
        assert state.measure(run[i], x[i]) is None
        state.observe(run[i], x[i], torch.full((1, 2), y))
    found = [state.measure(run[2], x[2]), state.measure(run[3], x[3])]
    assert [float(value) for value in found if value is not None] == pytest.approx([3 / 8, 1.5 / 8])


def test_signal_survives_a_host_that_updates_in_place() -> None:
    """k = 6 / 1, then a change of 3 in the input: 6 * 3 / 8."""
    x, state, step = torch.zeros(1, 4), OutputChange().start(), steps(4)[1]
    for value, move in ((2.0, 1.0), (8.0, 3.0)):
        state.measure(step, x)
        y = torch.full((1, 4), value)
        state.observe(step, x, y)
        y.zero_()
        x.add_(move)
    change = state.measure(step, x)
    assert change is not None and float(change) == pytest.approx(2.25)
