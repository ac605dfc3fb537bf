from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from hasten.forecast import Forecast, History, Hold, LeaveOneOut, Polynomial, Scaled, combine, lagrange
from tests.contract import ForecastContract, parts, seeded


class TestEveryForecast(ForecastContract):
    @pytest.fixture(params=parts(Forecast))
    def part(self, request: pytest.FixtureRequest) -> Forecast:
        return request.param


def curve(coefficients: list[float], time: float) -> Tensor:
    """Two polynomials at once, float64."""
    value = sum(c * time**k for k, c in enumerate(coefficients))
    other = sum(-c * (time - 0.3) ** k for k, c in enumerate(coefficients))
    return torch.tensor([value, other], dtype=torch.float64)


@st.composite
def grids(draw: st.DrawFn, num: int) -> list[float]:
    """Falling, irregular times in [0, 1] at least 0.02 apart."""
    gaps = draw(st.lists(st.floats(0.021, 0.98 / num), min_size=num, max_size=num))
    return [1.0 - total for total in itertools.accumulate(gaps)]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 4))
def test_polynomials_are_exact_on_any_grid(data: st.DataObject, degree: int) -> None:
    coefficients = data.draw(st.lists(st.floats(-3, 3), min_size=degree + 1, max_size=degree + 1))
    times = data.draw(grids(degree + 3))
    state = Polynomial(order=degree).start()
    for time in times[:-1]:
        state.store(time, curve(coefficients, time))
    amplification = sum(abs(w) for w in lagrange(times[-degree - 2 : -1], times[-1]))
    torch.testing.assert_close(
        state.estimate(times[-1]), curve(coefficients, times[-1]), rtol=1e-9, atol=1e-12 * (1 + amplification)
    )


@settings(max_examples=60, deadline=None)
@given(grids(5), st.floats(-0.2, 1.2))
def test_weights_sum_to_one(nodes: list[float], time: float) -> None:
    weights = lagrange(nodes, time)
    assert sum(weights) == pytest.approx(1.0, abs=1e-9 * sum(map(abs, weights)))


def test_a_degree_above_the_order_is_not_exact() -> None:
    """The exactness tests above can fail."""
    state = Polynomial(order=1).start()
    for time in (1.0, 0.8, 0.5):
        state.store(time, curve([0.0, 0.0, 1.0], time))
    assert not torch.allclose(state.estimate(0.2), curve([0.0, 0.0, 1.0], 0.2), atol=1e-2)


def test_hold_is_the_last_value() -> None:
    state = Hold().start()
    for number, time in enumerate((1.0, 0.5, 0.2)):
        state.store(time, seeded(number, 4))
        assert torch.equal(state.estimate(0.0), seeded(number, 4))


def test_damping_lies_between_polynomial_and_last_value() -> None:
    states = [Polynomial(order=2, damp=damp).start() for damp in (1.0, 0.25, 0.0)]
    for state in states:
        for number, time in enumerate((1.0, 0.8, 0.5)):
            state.store(time, seeded(number, 4, dtype=torch.float64))
    full, quarter, none = (state.estimate(0.3) for state in states)
    torch.testing.assert_close(none, seeded(2, 4, dtype=torch.float64))
    torch.testing.assert_close(quarter, 0.25 * full + 0.75 * none)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), grids(8))
def test_leave_one_out_finds_the_degree(degree: int, times: list[float]) -> None:
    coefficients = [0.7, -1.3, 2.1, -1.9][: degree + 1]
    state = LeaveOneOut(max_order=3).start()
    for time in times[:-1]:
        state.store(time, curve(coefficients, time))
    torch.testing.assert_close(
        state.estimate(times[-1]), curve(coefficients, times[-1]), rtol=1e-4, atol=1e-4
    )


def test_leave_one_out_holds_what_jumps() -> None:
    """Alternating values are extrapolated away from the truth by every order above 0."""
    state = LeaveOneOut(max_order=3).start()
    for number in range(8):
        state.store(1 - number / 10, torch.full((4,), float((-1) ** number)))
    assert float(state.estimate(0.2).abs().max()) == 1.0


def test_leave_one_out_goes_on_after_not_a_number() -> None:
    state = LeaveOneOut(max_order=2).start()
    values = [0.0, 1.0, float("nan"), 3.0, 4.0, 5.0, 6.0]
    for number, value in enumerate(values):
        state.store(1 - number / 10, torch.full((2,), value))
    torch.testing.assert_close(state.estimate(0.3), torch.full((2,), 7.0))


def test_scaled_is_exact_on_geometric_growth() -> None:
    state, direction = Scaled().start(), seeded(0, 16, dtype=torch.float64)
    for time in (1.0, 0.7):
        state.store(time, direction * 3.0**-time)
    torch.testing.assert_close(state.estimate(0.2), direction * 3.0**-0.2, rtol=1e-5, atol=0)


def test_scaled_at_zero_is_zero() -> None:
    state = Scaled().start()
    for time in (1.0, 0.9, 0.8):
        state.store(time, torch.zeros(4))
    assert torch.equal(state.estimate(0.1), torch.zeros(4))


def test_half_precision_is_summed_wide() -> None:
    """Weights of an extrapolation are large and of both signs; rounding each product to bfloat16 would show."""
    values = [seeded(i, 1000, dtype=torch.bfloat16) for i in range(3)]
    weights = [10.0, -25.0, 16.0]
    exact = sum(w * v.double() for w, v in zip(weights, values, strict=True))
    assert isinstance(exact, Tensor)
    assert torch.equal(combine(weights, values), exact.to(torch.bfloat16))


def test_a_repeated_time_leaves_the_degree() -> None:
    """A Heun-type history: the newer value replaces the older, and three distinct nodes stay three."""
    history = History(order=2)
    for time in (1.0, 0.8, 0.8, 0.5, 0.5):
        history.store(time, curve([1.0, 2.0, -3.0], time))
    assert len(history.nodes) == len(history.values) == 3
    torch.testing.assert_close(history.estimate(0.1), curve([1.0, 2.0, -3.0], 0.1))


def test_leave_one_out_keeps_what_it_remembers() -> None:
    """One lucky value does not change the order when earlier errors count."""
    straight = [0.0, 1.0, 2.0, 3.0, 4.0, 4.1]  # the last value is nearly what holding predicted
    quick, slow = LeaveOneOut(max_order=1).start(), LeaveOneOut(max_order=1, memory=0.9).start()
    for number, value in enumerate(straight):
        for state in (quick, slow):
            state.store(1 - number / 10, torch.full((2,), value))
    torch.testing.assert_close(quick.estimate(0.4), torch.full((2,), 4.1))
    torch.testing.assert_close(slow.estimate(0.4), torch.full((2,), 4.2))
    bent = LeaveOneOut(min_order=1, max_order=2, damp=0.75).start()
    for number, value in enumerate([0.0, 1.0, 4.0, 9.0]):
        bent.store(1 - number / 10, torch.full((2,), value))
    torch.testing.assert_close(bent.estimate(0.6), torch.full((2,), 0.75 * 16.0 + 0.25 * 9.0))


@settings(max_examples=20, deadline=None)
@given(grids(6), st.integers(2, 5), st.sampled_from([0.0, 0.5]), st.sampled_from([0.75, 1.0]))
def test_the_choice_on_the_device_is_the_choice_on_the_host(
    times: list[float], known: int, memory: float, damp: float
) -> None:
    state = LeaveOneOut(max_order=3, memory=memory, damp=damp).start()
    for number, time in enumerate(times[:known]):
        state.store(time, seeded(number, 5))
    torch.testing.assert_close(
        state.on_device(times[-1], state.errors.argmin()), state.estimate(times[-1]), rtol=1e-4, atol=1e-3
    )


def test_leave_one_out_refuses_orders_that_leave_nothing() -> None:
    with pytest.raises(ValidationError, match="min_order must be at most max_order"):
        LeaveOneOut(min_order=3, max_order=2)
