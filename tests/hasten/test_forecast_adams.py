"""Adams-Bashforth: a gap of its estimates moves a first-order solver like the exact integral of the output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.forecast import Polynomial
from hasten.forecast_adams import Adams, adams_bashforth
from hasten.recipe import Recipe
from tests.contract import seeded
from tests.hasten.test_forecast import curve, grids
from tests.pipelines.seam_contract import loop


def integral(coefficients: list[float], start: float, end: float) -> Tensor:
    """Exact integrals of the two polynomials of `curve`."""

    def of(time: float, shift: float) -> float:
        return sum(c * (time - shift) ** (k + 1) / (k + 1) for k, c in enumerate(coefficients))

    first, second = (of(end, shift) - of(start, shift) for shift in (0.0, 0.3))
    return torch.tensor([first, -second], dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 3), st.integers(1, 3))
def test_a_gap_is_integrated_exactly_on_any_grid(data: st.DataObject, order: int, gap: int) -> None:
    coefficients = data.draw(st.lists(st.floats(-3, 3), min_size=order + 1, max_size=order + 1))
    times = data.draw(grids(order + gap + 2))
    state = Adams(order=order).on(times).start()
    for time in times[: order + 1]:
        state.store(time, curve(coefficients, time))
    skipped = range(order + 1, order + 1 + gap)
    moved = sum((times[i + 1] - times[i]) * state.estimate(times[i]) for i in skipped)
    nodes = times[: order + 1]
    weights = adams_bashforth(nodes, times[order + 1], times[order + 1 + gap])
    assert isinstance(moved, Tensor)
    exact = integral(coefficients, times[order + 1], times[order + 1 + gap])
    torch.testing.assert_close(moved, exact, rtol=1e-8, atol=1e-11 * (1 + sum(map(abs, weights))) * 1e3)


def test_one_degree_more_is_not_exact() -> None:
    """The test above can fail."""
    times = [1.0, 0.8, 0.5, 0.3]
    state = Adams(order=1).on(times).start()
    for time in times[:2]:
        state.store(time, curve([0.0, 0.0, 1.0], time))
    moved = (0.3 - 0.5) * state.estimate(0.5)
    assert not torch.allclose(moved, integral([0.0, 0.0, 1.0], 0.5, 0.3), atol=1e-3)


def test_without_an_end_it_is_the_polynomial() -> None:
    times = [1.0, 0.8, 0.5, 0.3]
    plain, here, last = Polynomial(order=2).start(), Adams(order=2).start(), Adams(order=2).on(times).start()
    for number, time in enumerate(times[:3]):
        for state in (plain, here, last):
            state.store(time, seeded(number, 4))
    torch.testing.assert_close(here.estimate(0.3), plain.estimate(0.3))
    torch.testing.assert_close(last.estimate(0.3), plain.estimate(0.3), msg="the last step has no end")


def test_the_seam_tells_it_where_the_steps_end() -> None:
    """A network whose output is a quadratic of the time: skipped steps return its mean over the step."""

    class Quadratic(torch.nn.Module):
        now = 0.0

        def forward(self, hidden_states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (torch.full_like(hidden_states, self.now**2),)

    model, times = Quadratic(), [1 - i / 12 for i in range(12)]

    def call(index: int) -> list[dict[str, Tensor]]:
        model.now = times[index % 12]
        return [{"hidden_states": seeded(0, 1, 4)}]

    reuse = NetworkReuse(rule=Every(interval=2, warmup=5), forecast=Adams(order=2))
    outputs, run = loop(model, Recipe(reuse=reuse), call)
    ticks = [event.step for event in run.trace.events if event.action == "forecast"]
    assert ticks
    for index in [tick for tick in ticks if tick < 11]:
        a, b = run.clock.times[index], run.clock.times[index + 1]
        mean = (times[index] ** 2 + times[index] * times[index + 1] + times[index + 1] ** 2) / 3
        assert a > b and float(outputs[index][0].mean()) == pytest.approx(mean, rel=1e-3)
