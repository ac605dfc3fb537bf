"""Forecasts: what stands in for a tensor that was not computed.

A forecast sees the computed values `store(t, y)` in order and answers `estimate(t)`. `t` is `Step.time`,
a host number, so the weights cost nothing on the device; an estimate is one weighted sum of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from hasten.part import Part


class ForecastState(Protocol):
    """Running state of a forecast for one tensor of one branch at one site."""

    @property
    def ready(self) -> bool:
        """True when `estimate` may be called."""

    def store(self, t: float, y: Tensor) -> None:
        """Remember the computed value `y` at `t`."""

    def estimate(self, t: float) -> Tensor:
        """The value expected at `t`; same shape and dtype as what was stored. Do not modify it in place."""

    def tensors(self) -> list[Tensor]:
        """What is held, so that bytes can be counted."""


class Forecast(Part):
    """Family of forecasts."""

    def start(self) -> ForecastState:
        raise NotImplementedError(f"{type(self).__name__} has no start().")

    def on(self, times: Sequence[float]) -> Forecast:
        """This forecast for one run. times: `Step.time` of each of its steps, where known."""
        return self

    def refusal(self, times: Sequence[float]) -> str:
        """Why this forecast does not fit a run with these times, one sentence for the user; "" when it does."""
        return ""


class Hold(Forecast):
    """The last computed value. With an Euler solver this is exactly one longer step."""

    kind: ClassVar[str] = "hold"

    def start(self) -> ForecastState:
        return History(order=0)


class Polynomial(Forecast):
    """The polynomial through the last `order + 1` computed values, on the real, irregular grid.

    Lagrange form in `Step.time`; exact on polynomials of that degree for any spacing. TaylorSeer
    (arXiv 2503.06923) uses backward differences in the step index as if they were derivatives, which is
    exact for degree 1 on a regular grid only.

    order: degree; fewer values give a lower degree. damp: 1 for the plain polynomial; below 1 the estimate is drawn
    towards the last value, `damp * polynomial + (1 - damp) * last`.
    """

    kind: ClassVar[str] = "polynomial"
    order: int = Field(2, ge=0, le=4)
    damp: float = Field(1.0, ge=0, le=1)

    def start(self) -> ForecastState:
        return History(self.order, self.damp)


class LeaveOneOut(Forecast):
    """The polynomial whose order predicted the last computed value best.

    At each computed value every order up to `max_order` first predicts it from the earlier ones; the
    one with the least L2 error is used until the next. One scalar comparison per computed value.
    """

    kind: ClassVar[str] = "leave_one_out"
    max_order: int = Field(3, ge=0, le=4)

    def start(self) -> ForecastState:
        return BestOrder(self.max_order)


class Scaled(Forecast):
    """The last value times the ratio of norms of the last two, continued geometrically in `t`.

    MagCache (arXiv 2506.09045) observed that residual magnitudes change smoothly while directions hold;
    here the ratio is measured online instead of calibrated per model.
    """

    kind: ClassVar[str] = "scaled"

    def start(self) -> ForecastState:
        return NormRatio()


def lagrange(nodes: list[float], t: float) -> list[float]:
    """Weights w with p(t) = sum_i w_i y_i for the polynomial p through (nodes_i, y_i). Nodes are distinct."""
    weights = []
    for i, a in enumerate(nodes):
        w = 1.0
        for j, b in enumerate(nodes):
            if j != i:
                w *= (t - b) / (a - b)
        weights.append(w)
    return weights


def combine(weights: list[float], values: list[Tensor]) -> Tensor:
    """sum_i weights_i * values_i, in at least float32, returned in the dtype of the values."""
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total = values[0].to(wide) * weights[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total.add_(value.to(wide), alpha=weight)
    return total.to(values[0].dtype)


class History:
    """The last `order + 1` values and the polynomial through them."""

    def __init__(self, order: int, damp: float = 1.0) -> None:
        self.order, self.damp = order, damp
        self.nodes: list[float] = []
        self.values: list[Tensor] = []

    @property
    def ready(self) -> bool:
        return bool(self.values)

    def store(self, t: float, y: Tensor) -> None:
        if t in self.nodes:  # Heun-type solvers evaluate one time twice: the newer value replaces the older
            spot = self.nodes.index(t)
            del self.nodes[spot], self.values[spot]
        self.nodes = [*self.nodes, t][-(self.order + 1) :]
        self.values = [*self.values, y][-(self.order + 1) :]

    def estimate(self, t: float) -> Tensor:
        return self.of_order(t, self.order)

    def of_order(self, t: float, order: int) -> Tensor:
        """The polynomial of degree `order` through the newest values, at `t`."""
        nodes, values = self.nodes[-(order + 1) :], self.values[-(order + 1) :]
        weights = [self.damp * w for w in lagrange(nodes, t)]
        weights[-1] += 1.0 - self.damp
        return values[-1].clone() if len(values) == 1 else combine(weights, values)

    def tensors(self) -> list[Tensor]:
        return self.values


class BestOrder:
    """A `History` that re-chooses its order at each computed value."""

    def __init__(self, max_order: int) -> None:
        self.history = History(max_order)
        self.order = 0

    @property
    def ready(self) -> bool:
        return self.history.ready

    def store(self, t: float, y: Tensor) -> None:
        known = len(self.history.values)
        if known and t not in self.history.nodes:
            errors = [(self.history.of_order(t, p) - y).float().square().sum() for p in range(known)]
            best = int(torch.stack(errors).nan_to_num(float("inf")).argmin().item())
            # One more value is known after this store, so the winning order may be kept or was capped by `known`.
            self.order = best
        self.history.store(t, y)

    def estimate(self, t: float) -> Tensor:
        return self.history.of_order(t, self.order)

    def tensors(self) -> list[Tensor]:
        return self.history.tensors()


class NormRatio:
    """The last value and the rate at which its norm grows with `t`."""

    def __init__(self) -> None:
        self.node = 0.0
        self.value: Tensor | None = None
        self.norm: Tensor | None = None
        self.rate: Tensor | None = None

    @property
    def ready(self) -> bool:
        return self.value is not None

    def store(self, t: float, y: Tensor) -> None:
        norm = y.float().norm().clamp_min(1e-12)
        if self.norm is not None and t != self.node:
            self.rate = (norm / self.norm).log() / (t - self.node)
        self.node, self.value, self.norm = t, y, norm

    def estimate(self, t: float) -> Tensor:
        assert self.value is not None
        if self.rate is None:
            return self.value.clone()
        return (self.value.float() * torch.exp(self.rate * (t - self.node))).to(self.value.dtype)

    def tensors(self) -> list[Tensor]:
        return [] if self.value is None else [self.value]
