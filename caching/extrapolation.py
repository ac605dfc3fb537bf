"""Forecasts of two papers, as they are written there: to be compared with `hasten.forecast`, and for its users."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from hasten.forecast import Forecast, ForecastState, History, combine


class Taylor(Forecast):
    """TaylorSeer's series of backward differences (arXiv 2503.06923, eq. 6 and 7).

    D_0 = y and D_(i+1) = (D_i - D_i at the computed value before) / (t - t before); the estimate at t + e is
    sum_i D_i e^i / i!. Differences are not derivatives: for `order` >= 2, or an irregular grid, this is not exact on
    polynomials of that degree; `Polynomial` is. Differs from the official code: only values are held, and the
    differences are folded into their weights, so that an estimate is one weighted sum.

    order: highest power; fewer values give a lower one.
    """

    kind: ClassVar[str] = "taylor"
    order: int = Field(1, ge=0, le=4)

    def start(self) -> ForecastState:
        return _Taylor(self.order)


class Dynamic(Forecast):
    """FasterCache's dynamic feature reuse (arXiv 2410.19355, section 3.2): y + w (y - y'), y' the value before y.

    w rises linearly from `first` at `Step.time` 1 to `last` at 0, so what is added grows as the run goes on. The
    distance to the estimate plays no part (in the paper it is always one step). A value that is asked for at its own
    time is given back as it is.

    first, last: weight at the noisy and at the clean end; diffusers uses 0.5 for both.
    """

    kind: ClassVar[str] = "dynamic"
    first: float = Field(0.0, ge=0, le=2)
    last: float = Field(1.0, ge=0, le=2)

    def start(self) -> ForecastState:
        return _Dynamic(self.first, self.last)


class _Taylor(History):
    def estimate(self, t: float) -> Tensor:
        if len(self.values) == 1:
            return self.values[0].clone()
        return combine(taylor_weights(self.nodes, t), self.values)


class _Dynamic(History):
    def __init__(self, first: float, last: float) -> None:
        super().__init__(order=1)
        self.first, self.last = first, last

    def estimate(self, t: float) -> Tensor:
        if len(self.values) == 1 or t == self.nodes[-1]:
            return self.values[-1].clone()
        progress = 1.0 - min(max(t, 0.0), 1.0)
        weight = self.first + progress * (self.last - self.first)
        return combine([-weight, 1.0 + weight], self.values)


def taylor_weights(nodes: list[float], t: float) -> list[float]:
    """Weights w with sum_i w_i y_i equal to the series of backward differences at `t`. Nodes are distinct, oldest first.

    Differences are linear in the values, so they are carried as rows of coefficients.
    """
    num = len(nodes)
    rows = [[float(i == j) for j in range(num)] for i in range(num)]  # D_0 at each node
    weights = [0.0] * num
    for power in range(num):
        factor = (t - nodes[-1]) ** power / math.factorial(power)
        weights = [w + factor * d for w, d in zip(weights, rows[-1], strict=True)]
        gaps = [nodes[i] - nodes[i - 1] for i in range(num - len(rows) + 1, num)]
        rows = [
            [(new - old) / gap for new, old in zip(rows[i + 1], rows[i], strict=True)] for i, gap in enumerate(gaps)
        ]
    return weights
