"""Guidance policies: which branches of classifier-free guidance need to be evaluated.

Guidance combines a conditional output c and an unconditional one u as u + s (c - u). A policy says per
step whether u is needed, and what stands in for it. Legend: c, u outputs of the two branches, any shape.
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.drift import cosine_distance
from hasten.errors import RecipeError
from hasten.forecast import History
from hasten.recipe import Guidance
from hasten.step import Step


class GuidanceState(Protocol):
    """Running state of a guidance policy for one run."""

    def needs(self, step: Step) -> bool:
        """Must the unconditional branch be evaluated at this step?"""

    def observe(self, step: Step, c: Tensor, u: Tensor) -> None:
        """Both branches were evaluated."""

    def estimate(self, step: Step, c: Tensor) -> Tensor:
        """What stands in for u, given the conditional output of this step."""

    def tensors(self) -> list[Tensor]:
        """What is held, so that bytes can be counted."""


class AdaptiveGuidance(Guidance):
    """Stop guiding for good once both branches agree (Adaptive Guidance, arXiv 2312.12487, section 5).

    agreement: cosine similarity of c and u from which the unconditional branch is dropped. after: share of
    the run before which it is never dropped. The paper compares noise predictions; for a velocity the
    similarity is measured on the same tensors the solver combines, so the useful value is model-specific.
    """

    kind: ClassVar[str] = "adaptive"
    agreement: float = Field(0.9999, gt=0, le=1)
    after: float = Field(0.2, ge=0, le=1)

    def start(self) -> GuidanceState:
        return _Adaptive(self)


class AffineGuidance(Guidance):
    """Evaluate u at every `every`-th evaluated step and fit it in between (LinearAG, arXiv 2312.12487, eq. 11).

    u is an affine combination of c now and of c and u at the last step where both were known. LinearAG fits
    its coefficients offline, per step, on 200 trajectories; here they are fitted online by least squares at each
    step where u is known, so nothing has to be calibrated. before: share of the run in which u is always known.
    """

    kind: ClassVar[str] = "affine"
    every: int = Field(2, ge=1)
    before: float = Field(0.2, ge=0, le=1)

    def start(self) -> GuidanceState:
        return _Affine(self)


class HeldGuidance(Guidance):
    """From share `after` on, forecast the difference c - u instead of evaluating u.

    The result is c + (s - 1) d with d extrapolated through the last `order + 1` known differences, so
    guidance goes on at full strength. order 0 keeps the last difference. every: know the difference at
    each `every`-th evaluated step, 0 for never again.
    """

    kind: ClassVar[str] = "held"
    after: float = Field(0.3, ge=0, le=1)
    every: int = Field(2, ge=0)
    order: int = Field(0, ge=0, le=2)

    def start(self) -> GuidanceState:
        return _Held(self)


class ListedGuidance(Guidance):
    """Know the difference c - u at these shares of the run (0 the first step, 1 the last), and forecast it elsewhere.

    As `HeldGuidance`, for schedules found by a search (`hasten tune`): c + (s - 1) d with the polynomial through the last
    `order + 1` known differences. A listed step whose network is not evaluated counts from the next one that is.
    factors: what the forecast difference is multiplied by at each step of the run, the last one for all further steps; empty
    for 1 everywhere. The tuner fits them beside a solver's weights.
    """

    kind: ClassVar[str] = "listed"
    at: tuple[float, ...] = Field(min_length=1)
    order: int = Field(1, ge=0, le=2)
    factors: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _shares(self) -> ListedGuidance:
        if not all(0 <= share <= 1 for share in self.at):
            raise RecipeError(f"guidance.at are shares of the run, from 0 to 1, got {list(self.at)}.")
        if not all(map(math.isfinite, self.factors)):
            raise RecipeError(f"guidance.factors are finite numbers, one for each step of the run, got {list(self.factors)}.")
        return self

    def start(self) -> GuidanceState:
        return _Listed(self)


class GuidanceInterval(Guidance):
    """Guide only while `Step.time` lies in [low, high] (arXiv 2404.07724); outside, u := c."""

    kind: ClassVar[str] = "interval"
    low: float = Field(0.1, ge=0, le=1)
    high: float = Field(0.9, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceInterval:
        if self.low > self.high:
            raise RecipeError(f"guidance.low must not exceed guidance.high, got {self.low} and {self.high}.")
        return self

    def start(self) -> GuidanceState:
        return _Interval(self)


class _Adaptive:
    def __init__(self, policy: AdaptiveGuidance) -> None:
        self.policy = policy
        self.stopped = False
        self.apart: Tensor | None = None

    def needs(self, step: Step) -> bool:
        if self.apart is not None and not self.stopped and step.index >= self.policy.after * step.total:
            # Read one step late, so that the number is ready when it is fetched. NaN compares false: go on.
            self.stopped = float(self.apart) <= 1 - self.policy.agreement
        return not self.stopped

    def observe(self, step: Step, c: Tensor, u: Tensor) -> None:
        self.apart = cosine_distance(c, u)

    def estimate(self, step: Step, c: Tensor) -> Tensor:
        return c

    def tensors(self) -> list[Tensor]:
        return []


class _Counter:
    """Counts evaluated steps since u was last known."""

    def __init__(self) -> None:
        self.since = 0
        self.asked = -1
        self.answer = True

    def due(self, step: Step, every: int) -> bool:
        if step.index != self.asked:
            self.asked = step.index
            self.since += 1
            self.answer = every > 0 and self.since >= every
        return self.answer


class _Affine:
    def __init__(self, policy: AffineGuidance) -> None:
        self.policy = policy
        self.counter = _Counter()
        self.last: tuple[Tensor, Tensor] | None = None
        self.weights: Tensor | None = None

    def needs(self, step: Step) -> bool:
        due = self.counter.due(step, self.policy.every)
        return due or self.weights is None or step.index < self.policy.before * step.total

    def observe(self, step: Step, c: Tensor, u: Tensor) -> None:
        self.counter.since = 0
        if self.last is not None and self.last[0].shape == c.shape:
            self.weights = _least_squares(self._regressors(c), u - c)
        self.last = (c, u)

    def estimate(self, step: Step, c: Tensor) -> Tensor:
        assert self.weights is not None
        a, b = self._regressors(c)
        return torch.add(c.float(), self.weights[0] * a.float() + self.weights[1] * b.float()).to(c.dtype)

    def _regressors(self, c: Tensor) -> list[Tensor]:
        """c now - c then, and u then - c then: u - c is regressed on them, so equal branches stay equal."""
        assert self.last is not None
        old_c, old_u = self.last
        return [c - old_c, old_u - old_c]

    def tensors(self) -> list[Tensor]:
        return list(self.last or ())


def _least_squares(regressors: list[Tensor], target: Tensor) -> Tensor:
    """Weights (2,) minimising |target - sum_i w_i regressor_i|, ridge-damped so that parallel regressors are fine."""
    a, b = (r.float().flatten() for r in regressors)
    t = target.float().flatten()
    gram = torch.stack([torch.stack([a.dot(a), a.dot(b)]), torch.stack([a.dot(b), b.dot(b)])])
    ridge = 1e-6 * gram.diagonal().mean().clamp_min(1e-20) * torch.eye(2, device=gram.device)
    weights: Tensor = torch.linalg.solve(gram + ridge, torch.stack([a.dot(t), b.dot(t)]))
    return weights


class _Held:
    def __init__(self, policy: HeldGuidance) -> None:
        self.policy = policy
        self.counter = _Counter()
        self.difference = History(policy.order)

    def needs(self, step: Step) -> bool:
        due = self.counter.due(step, self.policy.every)
        return due or not self.difference.ready or step.index < self.policy.after * step.total

    def observe(self, step: Step, c: Tensor, u: Tensor) -> None:
        self.counter.since = 0
        self.difference.store(step.time, c - u)

    def estimate(self, step: Step, c: Tensor) -> Tensor:
        return c - self.difference.estimate(step.time)

    def tensors(self) -> list[Tensor]:
        return self.difference.tensors()


class _Listed:
    def __init__(self, policy: ListedGuidance) -> None:
        self.policy = policy
        self.known = -1
        self.difference = History(policy.order)

    def needs(self, step: Step) -> bool:
        if not self.difference.ready:
            return True
        due = [round(share * (step.total - 1)) for share in self.policy.at]
        return any(self.known < index <= step.index for index in due)

    def observe(self, step: Step, c: Tensor, u: Tensor) -> None:
        self.known = step.index
        self.difference.store(step.time, c - u)

    def estimate(self, step: Step, c: Tensor) -> Tensor:
        factors = self.policy.factors or (1.0,)
        return torch.sub(c, self.difference.estimate(step.time), alpha=factors[min(step.index, len(factors) - 1)])

    def tensors(self) -> list[Tensor]:
        return self.difference.tensors()


class _Interval:
    def __init__(self, policy: GuidanceInterval) -> None:
        self.policy = policy

    def needs(self, step: Step) -> bool:
        return self.policy.low <= step.time <= self.policy.high

    def observe(self, step: Step, c: Tensor, u: Tensor) -> None:
        return None

    def estimate(self, step: Step, c: Tensor) -> Tensor:
        return c

    def tensors(self) -> list[Tensor]:
        return []
