"""Rules that need no measurement: where the computed steps stand is known before the run starts."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from hasten.drift import Rule
from hasten.step import Step


class Schedule(Rule):
    """Base of the rules that are a set of computed step indices."""

    def computed(self, total: int) -> set[int]:
        """Indices in [0, total) that are computed. Index 0 always is."""
        raise NotImplementedError(f"{type(self).__name__} has no computed().")

    def start(self) -> _ScheduleState:
        return _ScheduleState(self)


class _ScheduleState:
    def __init__(self, rule: Schedule) -> None:
        self.rule = rule
        self.total = -1
        self.indices: set[int] = set()

    def skip(self, step: Step, change: float | None) -> bool:
        if step.total != self.total:
            self.total, self.indices = step.total, self.rule.computed(step.total)
        return step.index not in self.indices


class Every(Schedule):
    """Compute the first `warmup` steps, then one in `interval` (FORA, arXiv 2407.01425; PAB's steps)."""

    kind: ClassVar[str] = "every"
    interval: int = Field(2, ge=1)
    warmup: int = Field(1, ge=1)

    def computed(self, total: int) -> set[int]:
        return {i for i in range(total) if i < self.warmup or (i - self.warmup + 1) % self.interval == 0}


class Listed(Schedule):
    """Compute exactly these positions, given as shares of the run, 0 the first step and 1 the last.

    Shares instead of indices, so that a schedule found at 50 steps can be tried at another number.
    """

    kind: ClassVar[str] = "listed"
    at: tuple[float, ...] = Field(min_length=1)

    def computed(self, total: int) -> set[int]:
        return {0} | {min(total - 1, max(0, round(share * (total - 1)))) for share in self.at}


class Spread(Schedule):
    """`share` of the steps, placed evenly in the middle and denser towards both ends.

    The path bends most where it leaves the noise and where it meets the data. Position of the k-th of n
    computed steps: u = k / (n - 1), then (1 - ends) u + ends (1 - cos(pi u)) / 2, times the last index;
    `skew` > 1 moves the computed steps towards the start (u ** skew).
    """

    kind: ClassVar[str] = "spread"
    share: float = Field(0.25, gt=0, le=1)
    ends: float = Field(0.5, ge=0, le=1)
    skew: float = Field(1.0, gt=0, le=4)

    def computed(self, total: int) -> set[int]:
        num = min(total, max(2, round(self.share * total)))
        if num >= total:
            return set(range(total))
        found: set[int] = set()
        for k in range(num):
            u = (k / (num - 1)) ** self.skew
            warped = (1 - self.ends) * u + self.ends * (1 - math.cos(math.pi * u)) / 2
            index = round(warped * (total - 1))
            while index in found:  # dense ends at few steps may collide: take the next free one
                index += 1
            found.add(min(index, total - 1))
        return found
