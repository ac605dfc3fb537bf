"""Guidance by an error budget: the unconditional branch is left out where its forecast's measured error is affordable.

Legend: c, u outputs of the two branches, any shape; d = c - u; s the guidance scale of u + s (c - u).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from hasten.account import Account, angle, effect, sensitivity
from hasten.forecast import Forecast, ForecastState, Polynomial
from hasten.ledger import Ledger, gaps_to_come
from hasten.recipe import Guidance
from hasten.step import Step


class LedgerGuidance(Guidance):
    """Forecast d while the error that this is measured to make, s - 1 times that of d, stays within a budget.

    Own; the error control is that of `hasten.ledger.Ledger`, with which it shares one account where a recipe has both. The
    solver receives c + (s - 1) d. d falls along a bend, so that its forecasts lag on one side: the errors of all gaps are taken
    to point the same way and are added up themselves, not their squares. At each step where u is known the forecast of d is compared with the truth, which costs one
    sum over the latents; what a stand-in does to them counts until the next evaluation, because forecasts of whole steps
    in between are made from it.

    tolerance: |latents - plain latents| / |plain latents| at the end of the run that may be reached (rms). after: share of the
    run before which u is always known: early errors grow in a way that no measured error shows. forecast: of d, in
    `Step.time`. growth: exponent with which its error grows with the distance. Where a host evaluates one branch per step
    there is nothing to leave out, and nothing is done (`optional`).
    """

    kind: ClassVar[str] = "ledger"
    optional: ClassVar[bool] = True
    tolerance: float = Field(0.05, gt=0, le=1)
    after: float = Field(0.5, ge=0, le=1)
    forecast: Forecast = Polynomial(order=1, damp=0.75)
    growth: float = Field(1.0, ge=0.5, le=4)

    def start(self) -> LedgerGuidanceState:
        return LedgerGuidanceState(self)


class LedgerGuidanceState:
    """What guidance has spent in one run.

    scale: s, once the seam has measured it; channels: of d that the solver receives, None for all. spent: error (not squared)
    of the closed gaps. open: of the one that is open. rho: as in `LedgerState`. gap: (effect, distance) of each stand-in since d was known, at angle `node`.
    """

    level = "guidance"

    def __init__(self, policy: LedgerGuidance) -> None:
        self.policy = policy
        self.scale: float = 2.0
        self.channels: int | None = None
        self.times: Sequence[float] = ()
        self.forecast: ForecastState = policy.forecast.start()
        self.spent, self.open = 0.0, 0.0
        self.rho: float | None = None
        self.node: float | None = None
        self.gap: list[tuple[float, float]] = []
        self._asked, self._answer = -1, True
        self._standing: Step | None = None
        self._last_walk = 0.0
        self._latest: Step | None = None
        self.share(Account(policy.tolerance), ())

    def share(self, account: Account, times: Sequence[float]) -> None:
        """Spend of `account`, before the first step. times: `Step.time` of each step, where known."""
        self.account, self.times = account, times
        account.join(self)

    @property
    def square(self) -> float:
        return (self.spent + self.open) ** 2

    def needs(self, step: Step) -> bool:
        if step.index != self._asked:
            self.account.read()
            self._settle(step)
            self._asked, self._answer = step.index, not self._affordable(step)
            if not self._answer:
                self._standing = step
                self.open += self._error(step) * effect(step, self.times)
        return self._answer

    def observe(self, step: Step, c: Tensor, u: Tensor) -> None:
        self._settle(step)
        d = c - u
        if self.forecast.ready:
            off = self.forecast.estimate(step.time) - d
            off = off if self.channels is None else off[:, : self.channels]
            self.account.ask(off.float().square().mean().sqrt(), partial(self._told, self._distance(step), self.gap))
        self.forecast.store(step.time, d)
        self.node, self.gap = angle(step, step.time), []

    def estimate(self, step: Step, c: Tensor) -> Tensor:
        return (c - self.forecast.estimate(step.time)).to(c.dtype)

    def tensors(self) -> list[Tensor]:
        return self.forecast.tensors()

    # --- the account ------------------------------------------------------------------------------

    def _settle(self, step: Step) -> None:
        """`step` is evaluated: the last stand-in, if there is one, has stood until now."""
        if self._latest is not None and self._latest.index != step.index:
            self._last_walk = self._walk(self._latest, step)
        if self._standing is not None and self._standing.index != step.index:
            whole = self._walk(self._standing, step) * sensitivity(self._standing)
            self.gap.append((whole, self._distance(self._standing)))
            self.open = sum(walked * self._at(distance) for walked, distance in self.gap)
            self._standing = None
        self._latest = step

    def _told(self, distance: float, gap: list[tuple[float, float]], off: float) -> None:
        """A forecast of d over `distance` was off by `off` (rms), and the stand-ins of `gap` were made from where it was."""
        self.open = 0.0
        if not math.isfinite(off):  # NaN was computed: nothing of it may stand in
            self.forecast, self.rho, self.node = self.policy.forecast.start(), None, None
            return
        if distance:
            new = abs(self.scale - 1) * off / distance**self.policy.growth
            # As in `LedgerState`: rising errors are believed at once, falling ones by half.
            self.rho = new if self.rho is None else max(new, math.sqrt(new * self.rho))
            self.spent += sum(walked * new * far**self.policy.growth for walked, far in gap)

    def _affordable(self, step: Step) -> bool:
        if self.rho is None or not self.forecast.ready or step.index < self.policy.after * step.total:
            return False
        planned = Ledger(tolerance=self.policy.tolerance).within(self.account.open_to(self))
        walk = max(effect(step, self.times), self._last_walk * sensitivity(step))
        left = max(0.0, self.account.open_to(self) / math.sqrt(self.account.levels) - self.spent)
        return self.open + self._error(step) * walk <= left / gaps_to_come(step, planned)

    def _error(self, step: Step) -> float:
        return self._at(self._distance(step))

    def _at(self, distance: float) -> float:
        return (self.rho or 0.0) * math.pow(distance, self.policy.growth)

    def _distance(self, step: Step) -> float:
        return abs(angle(step, step.time) - self.node) if self.node is not None else 0.0

    @staticmethod
    def _walk(start: Step, end: Step) -> float:
        return abs(angle(start, start.time) - angle(end, end.time))
