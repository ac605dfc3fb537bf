"""Two rules after one another: what suits the turbulent start of a run need not suit its smooth end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from hasten.caching.rules import Every
from hasten.drift import Drift, Rule, RuleState
from hasten.step import Step


class Phases(Rule):
    """`early` decides in the first `switch` of the steps, `late` in the rest.

    SADA decides by the trajectory at first and goes on with a fixed pattern once the path is smooth. Both see every
    step, so `late` counts from the start of the run. A step whose signal is unknown is computed in both phases.
    """

    kind: ClassVar[str] = "phases"
    needs_signal: ClassVar[bool] = True
    early: Rule = Drift()
    late: Rule = Every(interval=4)
    switch: float = Field(0.5, ge=0, le=1)

    @property
    def threshold_value(self) -> float | None:
        return self.early.threshold_value

    def start(self, times: Sequence[float] = ()) -> RuleState:
        return _Phases(self, times)


class _Phases:
    def __init__(self, rule: Phases, times: Sequence[float]) -> None:
        self.switch = rule.switch
        self.early, self.late = rule.early.start(times), rule.late.start(times)

    def skip(self, step: Step, change: float | None) -> bool:
        early, late = self.early.skip(step, change), self.late.skip(step, change)
        chosen = early if step.index < self.switch * step.total else late
        return chosen and change is not None and math.isfinite(change)
