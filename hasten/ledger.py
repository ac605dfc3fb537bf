"""The error budget: a tolerance buys a number of computed steps, and measured errors may take skips back.

How many evaluations a tolerance needs, and where they belong, is known beforehand to a good part: early errors grow
in a way that no residual shows until it is too late. What a run can tell is how rough this model and this prompt are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from hasten.account import Account, angle, effect
from hasten.drift import Rule
from hasten.step import Step

PATH = (0.0, 0.082, 0.12, 0.163, 0.22, 0.28, 0.367, 0.46, 0.58, 0.73, 0.85, 0.94, 1.0)
"""Where computed steps belong: shares of the run at the shares 0, 1/12, ... 1 of the computed steps. What searches of
single positions agreed on for eight and for twelve steps (`benchmarks/tune_presets.py`)."""


class Ledger(Rule):
    """Compute as many steps as the tolerance needs along `PATH`; more where the forecasts' errors add up to more.

    Own. The plan: a gap of linear forecasts, corrected, is off by the third power of its length, and so is a run by
    about the third power of 1 / n. The account: step-size control of adaptive ODE solvers (Hairer, Norsett, Wanner,
    Solving ODEs I, II.4) with the error of a forecast, which costs no evaluation, and one budget for the whole run,
    spread over the gaps that are still to come.

    tolerance: |latents - plain latents| / |plain latents| at the end of the run that may be reached (rms). Latents are
        taken to have unit variance at the end, as latent diffusion pipelines normalise them.
    nodes: a run computes at least nodes * tolerance^(-1/3) steps, whatever the number of solver steps. Chosen on
        `tiny-video` and `tiny-image`, on other prompts than those of `docs/budget.md`, which says how well it holds.
    growth: exponent q with which a forecast's error grows with the distance, rho |angle - angle'|^q; rho is measured.
    """

    kind: ClassVar[str] = "ledger"
    needs_errors: ClassVar[bool] = True
    tolerance: float = Field(0.05, gt=0, le=1)
    nodes: float = Field(5.25, ge=1, le=50)
    growth: float = Field(1.0, ge=0.5, le=4)

    @property
    def threshold_value(self) -> float | None:
        return self.tolerance

    @property
    def planned(self) -> float:
        """Least number of computed steps of a run that spends the tolerance alone."""
        return self.within(self.tolerance)

    def within(self, tolerance: float) -> float:
        """Number of computed steps that a tolerance needs."""
        return self.nodes * float(tolerance ** (-1 / 3))

    def start(self, times: Sequence[float] = ()) -> LedgerState:
        return LedgerState(self, times)


class LedgerState:
    """What one run has spent.

    spent: sum over the closed gaps of the squared error that their forecasts caused. pending: the estimate for the gap
    that is open. rho: measured error of a forecast per distance^growth. due: index that is computed
    next at the latest. account: what it spends of; another one with `share`, where other levels spend of it, too.
    """

    level = "reuse"

    def __init__(self, rule: Ledger, times: Sequence[float]) -> None:
        self.rule, self.times = rule, times
        self.spent, self.pending = 0.0, 0.0
        self.rho: float | None = None
        self.node: float | None = None
        self.gap: list[tuple[float, float]] = []
        self.computed, self.due = 0, 0
        self.share(Account(rule.tolerance))

    def share(self, account: Account) -> None:
        """Spend of `account`, before the first step."""
        self.account = account
        account.join(self)

    @property
    def square(self) -> float:
        """Squared relative error of the final latents that the run so far is estimated to cause, before correction."""
        return self.spent + self.pending**2

    @property
    def estimate(self) -> float:
        """Its root."""
        return math.sqrt(self.square)

    def skip(self, step: Step, change: float | None) -> bool:
        if self.node is not None and step.index < self.due and self._affordable(step):
            self.pending += self._cost(step)
            self.gap.append((effect(step, self.times), self._distance(step)))
            return True
        self.computed += 1
        self.due = step.index + max(1, round(self._gap(step)))
        return False

    def _gap(self, step: Step) -> float:
        """Steps from one computed step to the next, as planned: from where it really is, so that gaps grow smoothly.

        A gap twice as long as the one before it is extrapolated from too short a base, and rounding a list of positions
        makes such pairs.
        """
        way = _before(step.index / step.total)
        return (_along(min(1.0, way + 1 / self._planned), PATH) - _along(way, PATH)) * step.total

    @property
    def _planned(self) -> float:
        """Computed steps that a whole run needs within what other levels have left."""
        return self.rule.within(self.account.open_to(self))

    def learn(self, step: Step, error: float | None) -> None:
        """`step` was computed; its forecast would have been off by `error` (rms), None when there was no forecast."""
        if error is not None and math.isfinite(error) and self._distance(step):
            new = error / self._distance(step) ** self.rule.growth
            # Rising errors are believed at once, falling ones by half: one lucky forecast must not buy a long gap.
            self.rho = new if self.rho is None else max(new, math.sqrt(new * self.rho))
            self.spent += sum(effects * new * distance**self.rule.growth for effects, distance in self.gap) ** 2
        self.node, self.gap, self.pending = angle(step, step.time), [], 0.0

    def _cost(self, step: Step) -> float:
        return effect(step, self.times) * (self.rho or 0.0) * math.pow(self._distance(step), self.rule.growth)

    def _affordable(self, step: Step) -> bool:
        """Whether the open gap may go on: the rest of the tolerance, shared with the planned gaps to come."""
        if self.rho is None:  # nothing is measured yet: the first gap goes by the plan alone
            return self.computed == 1
        allowed = self.account.per_gap(self, self.spent, gaps_to_come(step, self._planned))
        return self.pending + self._cost(step) <= allowed

    def _distance(self, step: Step) -> float:
        return abs(angle(step, step.time) - self.node) if self.node is not None else 0.0


def gaps_to_come(step: Step, planned: float) -> float:
    """How many of a run's `planned` gaps are still to come at `step`, the one that it stands in among them; at least 1."""
    return max(1.0, (1 - _before(step.index / step.total)) * planned + 1)


def _along(way: float, values: Sequence[float]) -> float:
    """The value at `way` (0 to 1) through the list, straight lines between its members."""
    spot = way * (len(values) - 1)
    low = min(math.floor(spot), len(values) - 2)
    return values[low] + (spot - low) * (values[low + 1] - values[low])


def _before(position: float) -> float:
    """The way along `PATH` at which this share of the run is reached: the inverse of `_along`."""
    for number, (low, high) in enumerate(itertools.pairwise(PATH)):
        if position <= high:
            return (number + (position - low) / (high - low)) / (len(PATH) - 1)
    return 1.0
