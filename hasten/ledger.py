"""The error budget: a tolerance is spent on skipped steps, and what was spent is read from the forecasts' errors.

An exact run and a run with forecasts differ, at first order, by the sum of what each skipped step is off by,
carried to the end. How far a forecast is off is measured for free whenever a value is computed after all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from hasten.drift import Rule
from hasten.step import Step

LEAST = 0.02
"""Share of the tolerance's square that stays available when everything is spent, so that steps which cost next to
nothing may still be skipped."""


class Ledger(Rule):
    """Skip as long as the errors of the forecasts, added up over the run, stay within a tolerance.

    Own. The step-size control of adaptive ODE solvers (Hairer, Norsett, Wanner, Solving ODEs I, II.4), with three
    differences: the grid is given, the error is that of a forecast and costs no evaluation, and one budget for the
    whole run is spread over the gaps that are still to come.

    tolerance: |latents - plain latents| / |plain latents| at the end of the run that may be reached (rms). Latents are
        taken to have unit variance at the end, as latent diffusion pipelines normalise them.
    growth: exponent q with which a forecast's error grows with the distance, rho |angle - angle'|^q; rho is measured.
    early: how much more an error at the noisy end counts than one at the clean end; errors there grow afterwards.
    opening: share of the run that is skipped after the first step, before anything is measured.
    longest: longest gap as a share of the run.
    """

    kind: ClassVar[str] = "ledger"
    needs_errors: ClassVar[bool] = True
    tolerance: float = Field(0.05, gt=0, le=1)
    growth: float = Field(1.0, ge=0.5, le=4)
    early: float = Field(2.0, ge=1, le=10)
    opening: float = Field(0.04, ge=0, le=0.2)
    longest: float = Field(0.25, gt=0, le=1)

    @property
    def threshold_value(self) -> float | None:
        return self.tolerance

    def start(self, times: Sequence[float] = ()) -> LedgerState:
        return LedgerState(self, times)


class LedgerState:
    """What one run has spent.

    spent: sum over the closed gaps of the squared error that they are estimated to cause at the end.
    pending: the estimate for the gap that is open. rho: measured error of a forecast per distance^growth.
    """

    def __init__(self, rule: Ledger, times: Sequence[float]) -> None:
        self.rule, self.times = rule, times
        self.spent, self.pending = 0.0, 0.0
        self.rho: float | None = None
        self.node: float | None = None
        self.gap: list[tuple[float, float]] = []
        self.length = 0
        self.computed = 0

    @property
    def estimate(self) -> float:
        """Relative error of the final latents that the run so far is estimated to cause."""
        return math.sqrt(self.spent + self.pending**2)

    def skip(self, step: Step, change: float | None) -> bool:
        angle = _angle(step, step.time)
        if self.node is not None and not self._capped(step):
            if self.rho is None:
                opening = max(1, round(self.rule.opening * step.total))
                skips = self.computed == 1 and len(self.gap) < opening and step.index <= opening
                cost = 0.0
            else:
                cost = self.pending + self._effect(step) * self.rho * abs(angle - self.node) ** self.rule.growth
                skips = cost * self._sensitivity(self.node) <= self._allowance(step)
            if skips:
                self.pending = cost
                self.gap.append((self._effect(step), abs(angle - self.node)))
                return True
        self.computed += 1
        return False

    def learn(self, step: Step, error: float | None) -> None:
        """`step` was computed; its forecast would have been off by `error` (rms), None when there was no forecast."""
        angle = _angle(step, step.time)
        if error is not None and math.isfinite(error) and self.node is not None and angle != self.node:
            new = error / abs(angle - self.node) ** self.rule.growth
            # Rising errors are believed at once, falling ones by half: one lucky forecast must not buy a long gap.
            self.rho = new if self.rho is None else max(new, math.sqrt(new * self.rho))
            off = sum(effect * new * distance**self.rule.growth for effect, distance in self.gap)
            self.spent += (off * self._sensitivity(self.node)) ** 2
        self.length = len(self.gap) if self.gap else max(0, self.length - 1)
        self.node, self.gap, self.pending = angle, [], 0.0

    def _capped(self, step: Step) -> bool:
        """Gaps grow slowly, as an adaptive solver's steps do: what was measured over a short one may not hold farther."""
        return len(self.gap) >= min(2 * self.length + 2, max(1, round(self.rule.longest * step.total)))

    def _allowance(self, step: Step) -> float:
        """The error that the open gap may cause: the rest of the budget, shared with the gaps to come."""
        tolerance = self.rule.tolerance**2
        gaps = max(1.0, (step.total - step.index) / (self.length + 1))
        return math.sqrt(max(tolerance - self.spent, LEAST * tolerance) / gaps)

    def _sensitivity(self, angle: float) -> float:
        """1 from half way on, rising to `early` at pure noise."""
        way = (angle / (math.pi / 2) - 0.75) / 0.2
        return 1 + (self.rule.early - 1) * min(1.0, max(0.0, way))

    def _effect(self, step: Step) -> float:
        """How far an output that is off by one moves the latents, at unit variance: |b| times the angle walked.

        On the unit circle (`Level.velocity`) a Gaussian keeps its size, so what is added now is there at the end.
        """
        after = self.times[step.index + 1] if step.index + 1 < len(self.times) else 0.0
        walked = abs(_angle(step, step.time) - _angle(step, after))
        velocity = step.level.velocity if step.level is not None else None
        return walked * (abs(velocity[1]) if velocity is not None else 1.0)


def _angle(step: Step, time: float) -> float:
    """atan(sigma / alpha) in [0, pi / 2] at `time`, on the path that `step` is on."""
    if step.level is not None and abs(step.level.sigma - step.time) < 1e-6:  # flow matching: time is sigma
        return math.atan2(time, 1 - time)
    return time * math.pi / 2
