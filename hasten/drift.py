"""Rules: may this evaluation be skipped? The drift gate is the adaptive one.

A rule is asked once per step and run, before the first branch is evaluated, and sees one host number:
how far the watched signal has moved. `None` means nothing was measured (no history, not finite): compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from hasten.part import Part
from hasten.step import Step


class RuleState(Protocol):
    """Running state of a rule for one run."""

    def skip(self, step: Step, change: float | None) -> bool:
        """True when `step` may be skipped. Called for each step in order, whatever was decided before."""


class AccountState(RuleState, Protocol):
    """Running state of a rule with `needs_errors`."""

    def learn(self, step: Step, error: float | None) -> None:
        """`step` was computed; its forecast would have been off by `error` (rms in what the solver receives)."""

    @property
    def estimate(self) -> float:
        """Relative error of the final latents that the skips so far are estimated to cause."""


class Rule(Part):
    """Family of rules.

    needs_signal: whether `skip` looks at `change`; the seam measures nothing otherwise.
    needs_errors: whether the state is an `AccountState`, told at each computed step how far its forecast would have
    been off.
    """

    needs_signal: ClassVar[bool] = False
    needs_errors: ClassVar[bool] = False

    @property
    def threshold_value(self) -> float | None:
        """What the signal is compared with, for the report; None for rules that compare nothing."""
        return None

    def start(self, times: Sequence[float] = ()) -> RuleState:
        """Fresh state for one run. times: `Step.time` of each step of the run, where known."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class Drift(Rule):
    """Skip while the signal's (accumulated) change stays below a threshold.

    TeaCache and EasyCache accumulate the changes since the last computed step; first-block caching
    compares with the last computed step (`accumulate=False`).

    limit: the threshold, relative. max_skips: most skips in a row, None for no cap. warmup, tail:
    share of the run at its start and end that is always computed (at least one step each).
    """

    kind: ClassVar[str] = "drift"
    needs_signal: ClassVar[bool] = True
    limit: float = Field(0.05, ge=0)
    accumulate: bool = True
    max_skips: int | None = Field(None, ge=1)
    warmup: float = Field(0.1, ge=0, le=1)
    tail: float = Field(0.02, ge=0, le=1)

    @property
    def threshold_value(self) -> float | None:
        return self.limit

    def start(self, times: Sequence[float] = ()) -> RuleState:
        return _DriftState(self)


class _DriftState:
    def __init__(self, rule: Drift) -> None:
        self.rule = rule
        self.total = 0.0
        self.skips = 0

    def skip(self, step: Step, change: float | None) -> bool:
        rule = self.rule
        guarded = step.index < max(1, math.ceil(rule.warmup * step.total))
        guarded |= step.index >= step.total - max(1, math.ceil(rule.tail * step.total))
        capped = rule.max_skips is not None and self.skips >= rule.max_skips
        if change is not None and math.isfinite(change):
            self.total = self.total + change if rule.accumulate else change
            if self.total < rule.limit and not guarded and not capped:
                self.skips += 1
                return True
        self.total, self.skips = 0.0, 0
        return False


def relative_l1(new: Tensor, old: Tensor) -> Tensor:
    """mean|new - old| / mean|old| as a 0-d float32 tensor; NaN when either is not finite."""
    return (new - old).float().abs().mean() / old.float().abs().mean().clamp_min(1e-12)


def cosine_distance(new: Tensor, old: Tensor) -> Tensor:
    """1 - cos(new, old) over all elements, as a 0-d float32 tensor."""
    a, b = new.float().flatten(), old.float().flatten()
    similarity: Tensor = torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-12)
    return 1.0 - similarity


def kl_divergence(new: Tensor, old: Tensor) -> Tensor:
    """Mean KL(softmax(new) || softmax(old)) over the last dimension, in nats, as a 0-d float32 tensor."""
    log_p, log_q = new.float().log_softmax(-1), old.float().log_softmax(-1)
    divergence: Tensor = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return divergence


def curvature(new: Tensor, old: Tensor, older: Tensor) -> Tensor:
    """|new - 2 old + older| / |new - old|: how far three equally spaced values are from a line."""
    bend = (new - 2 * old + older).float().norm()
    turn: Tensor = bend / (new - old).float().norm().clamp_min(1e-12)
    return turn
