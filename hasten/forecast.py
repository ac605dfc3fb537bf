"""Forecasts: what stands in for a tensor that was not computed.

A forecast sees the computed values `store(t, y)` in order and answers `estimate(t)`. `t` is `Step.time`,
a host number, so the weights cost nothing on the device; an estimate is one weighted sum of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from pydantic import Field, model_validator
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
    """The polynomial whose order predicted the computed values best.

    At each computed value every order first predicts it from the earlier ones; the one with the least squared error is
    used until the next. The choice stays on the device: no synchronisation.

    min_order, max_order: orders to choose from; `min_order` until two values are known. damp: as in `Polynomial`, for
    every order. memory: share that earlier errors keep, 0 for the last value's alone.
    """

    kind: ClassVar[str] = "leave_one_out"
    min_order: int = Field(0, ge=0, le=4)
    max_order: int = Field(3, ge=0, le=4)
    damp: float = Field(1.0, ge=0, le=1)
    memory: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _ordered(self) -> LeaveOneOut:
        if self.min_order > self.max_order:
            raise ValueError(f"min_order must be at most max_order, got {self.min_order} and {self.max_order}")
        return self

    def start(self) -> ForecastState:
        return BestOrder(self)


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
        values = self.values[-(order + 1) :]
        return values[-1].clone() if len(values) == 1 else combine(self.weights(t, order), values)

    def weights(self, t: float, order: int) -> list[float]:
        """What of the newest `order + 1` values, oldest first, makes the estimate at `t`."""
        weights = [self.damp * w for w in lagrange(self.nodes[-(order + 1) :], t)]
        weights[-1] += 1.0 - self.damp
        return weights

    def tensors(self) -> list[Tensor]:
        return self.values


class BestOrder:
    """A `History` that re-chooses its order at each computed value.

    errors: (orders,) float64 on the device, infinite for orders that have not predicted anything. NaN counts as infinite.
    """

    def __init__(self, policy: LeaveOneOut) -> None:
        self.policy = policy
        self.history = History(policy.max_order, policy.damp)
        self.orders = range(policy.min_order, policy.max_order + 1)
        self.errors: Tensor | None = None

    @property
    def ready(self) -> bool:
        return self.history.ready

    def store(self, t: float, y: Tensor) -> None:
        known = len(self.history.values)
        if known and t not in self.history.nodes:
            never = torch.full((), math.inf, dtype=torch.float64, device=y.device)
            # An order that has too few values yet would be a lower one under its name.
            new = torch.stack([self._error(p, t, y) if p < known else never for p in self.orders])
            new = new.nan_to_num(nan=math.inf, posinf=math.inf)
            keep = self.policy.memory
            mixed = new if self.errors is None or not keep else keep * self.errors + (1 - keep) * new
            self.errors = torch.where(mixed.isfinite(), mixed, new)
        self.history.store(t, y)

    def _error(self, order: int, t: float, y: Tensor) -> Tensor:
        return (self.history.of_order(t, order) - y).double().square().sum()

    def estimate(self, t: float) -> Tensor:
        if self.errors is None or len(self.orders) == 1:
            return self.history.of_order(t, self.policy.min_order)
        if self.errors.device.type == "cpu":  # reading the choice waits for nothing here
            return self.history.of_order(t, self.orders[int(self.errors.argmin())])
        return self.on_device(t, self.errors.argmin())

    def on_device(self, t: float, best: Tensor) -> Tensor:
        """The estimate of the order with the index `best`, which stays where it is."""
        values = self.history.values
        # One row of weights per order, for the values from the oldest to the newest; the best row is taken on the device.
        rows = [self.history.weights(t, min(order, len(values) - 1)) for order in self.orders]
        table = torch.tensor([[0.0] * (len(values) - len(row)) + row for row in rows], dtype=torch.float32)
        chosen = table.to(values[0].device, non_blocking=True)[best]
        wide = torch.promote_types(values[0].dtype, torch.float32)
        # A value without weight stays out even where it is not a number.
        parts = [torch.where(w == 0, 0.0, value.to(wide) * w) for w, value in zip(chosen, values, strict=True)]
        return torch.stack(parts).sum(0).to(values[0].dtype)

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
