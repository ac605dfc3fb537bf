"""The Adams-Bashforth forecast: what a step of the solver needs is the mean of the output over it, not its value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from hasten.forecast import Forecast, ForecastState, History, combine, lagrange


class Adams(Forecast):
    """The mean, over the step that is skipped, of the polynomial through the last `order` + 1 computed values.

    With a first-order solver that moves the latents by (t' - t) y, a gap of such estimates is the Adams-Bashforth
    step over the gap on the real, irregular grid: exact where y is a polynomial of degree `order`, and of one
    order more than the solver itself. SADA (arXiv 2507.17135) uses it with three values and fixed coefficients to tell
    where the path leads. `Polynomial` is the value at the beginning of the step: it follows the plain run of the same solver,
    errors of discretisation and all; this one follows the exact path.

    times: `Step.time` of each step of the run; `on` fills it in. A step whose end is not known (the last one, or any without
    `times`) has the polynomial's value, as if it were short.
    """

    kind: ClassVar[str] = "adams"
    order: int = Field(2, ge=0, le=3)
    times: tuple[float, ...] = ()

    def on(self, times: Sequence[float]) -> Forecast:
        return self.model_copy(update={"times": tuple(times)})

    def start(self) -> ForecastState:
        return _Adams(self)


class _Adams(History):
    def __init__(self, part: Adams) -> None:
        super().__init__(part.order)
        self.ends = dict(zip(part.times, part.times[1:], strict=False))

    def estimate(self, t: float) -> Tensor:
        end = self.ends.get(t, t)
        # A value that was computed at this very time stands for the whole step, as it would for the solver.
        if end == t or t in self.nodes:
            return super().estimate(t)
        return combine([w / (end - t) for w in adams_bashforth(self.nodes, t, end)], self.values)


def adams_bashforth(nodes: list[float], start: float, end: float) -> list[float]:
    """Weights w with sum_i w_i y_i = integral from start to end of the polynomial through (nodes_i, y_i), up to 4 nodes.

    On equal steps with three nodes these are h (23, -16, 5) / 12. Simpson's rule, exact for cubics, does the integral.
    """
    middle, width = (start + end) / 2, end - start
    shares = zip(lagrange(nodes, start), lagrange(nodes, middle), lagrange(nodes, end), strict=True)
    return [width / 6 * (a + 4 * b + c) for a, b, c in shares]
