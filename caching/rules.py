"""Rules that need no measurement: where the computed steps stand is known before the run starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from hasten.drift import Rule
from hasten.step import Step


class Schedule(Rule):
    """Base of the rules that are a set of computed step indices."""

    def computed(self, total: int, times: Sequence[float] = ()) -> set[int]:
        """Indices in [0, total) that are computed; 0 always is. times: `Step.time` of each step, where known."""
        raise NotImplementedError(f"{type(self).__name__} has no computed().")

    def start(self, times: Sequence[float] = ()) -> _ScheduleState:
        return _ScheduleState(self, times)


class _ScheduleState:
    def __init__(self, rule: Schedule, times: Sequence[float]) -> None:
        self.rule, self.times = rule, times
        self.total = -1
        self.indices: set[int] = set()

    def skip(self, step: Step, change: float | None) -> bool:
        if step.total != self.total:
            self.total, self.indices = step.total, self.rule.computed(step.total, self.times)
        return step.index not in self.indices


class Every(Schedule):
    """Compute the first `warmup` steps, then one in `interval` (FORA, arXiv 2407.01425; PAB's steps)."""

    kind: ClassVar[str] = "every"
    interval: int = Field(2, ge=1)
    warmup: int = Field(1, ge=1)

    def computed(self, total: int, times: Sequence[float] = ()) -> set[int]:
        return {i for i in range(total) if i < self.warmup or (i - self.warmup + 1) % self.interval == 0}


class Window(Schedule):
    """Between the shares `begin` and `end` of the run compute the steps that `interval` divides; outside, all.

    Pyramid attention broadcast (arXiv 2408.12588) skips between the timesteps 800 and 100 of 1000. Here they are
    shares of the run, 0 its first step and 1 its end: the same on evenly spaced timesteps.
    """

    kind: ClassVar[str] = "window"
    interval: int = Field(2, ge=1)
    begin: float = Field(0.2, ge=0, le=1)
    end: float = Field(0.9, ge=0, le=1)

    def computed(self, total: int, times: Sequence[float] = ()) -> set[int]:
        return {i for i in range(total) if i % self.interval == 0 or not self.begin <= i / total < self.end}


class Listed(Schedule):
    """Compute these positions, given as shares of the run, 0 the first step and 1 the last.

    Shares instead of indices, so that a schedule found at 50 steps can be tried at another number. share: None for
    exactly these positions; else how many steps are computed, as a share of the run (at least three), placed along the
    listed positions (which are then in order), with straight lines between them: a short run keeps its speed-up.
    """

    kind: ClassVar[str] = "listed"
    at: tuple[float, ...] = Field(min_length=1)
    share: float | None = Field(None, gt=0, le=1)

    def computed(self, total: int, times: Sequence[float] = ()) -> set[int]:
        if self.share is None:
            return {0} | {min(total - 1, max(0, round(share * (total - 1)))) for share in self.at}
        num = min(total, max(3, round(self.share * total)))
        found = {0}
        for k in range(1, num):
            target = self._between(k / (num - 1)) * (total - 1)
            found.add(min((i for i in range(total) if i not in found), key=lambda i: abs(i - target)))
        return found

    def _between(self, way: float) -> float:
        """The position at `way` (0 to 1) through the list."""
        spot = way * (len(self.at) - 1)
        low = min(math.floor(spot), len(self.at) - 1)
        high = min(low + 1, len(self.at) - 1)
        return self.at[low] + (spot - low) * (self.at[high] - self.at[low])


class Spread(Schedule):
    """`share` of the steps, spread evenly over the noise levels (or over the steps).

    An output changes with the noise level, not with the number of the step: a shifted schedule takes many
    small steps where nothing happens. Position of the k-th of n computed steps: u = (k / (n - 1)) ** skew,
    then (1 - ends) u + ends (1 - cos(pi u)) / 2 of the way from the first `Step.time` to the last; the
    nearest free step is taken. ends: 0 even, 1 densest at both ends. skew: above 1 moves steps to the start.
    until: where the last computed step stands, as a share of the way. by: "time", or "step" to spread over
    step indices.
    """

    kind: ClassVar[str] = "spread"
    share: float = Field(0.25, gt=0, le=1)
    ends: float = Field(0.0, ge=0, le=1)
    skew: float = Field(1.0, gt=0, le=4)
    until: float = Field(1.0, gt=0, le=1)
    by: Literal["time", "step"] = "time"

    def computed(self, total: int, times: Sequence[float] = ()) -> set[int]:
        num = min(total, max(3, round(self.share * total)))
        if num >= total:
            return set(range(total))
        grid = list(times) if self.by == "time" and len(times) == total else [float(-i) for i in range(total)]
        found = {0}
        for k in range(1, num):
            u = (k / (num - 1)) ** self.skew
            way = (1 - self.ends) * u + self.ends * (1 - math.cos(math.pi * u)) / 2
            target = grid[0] + way * self.until * (grid[-1] - grid[0])
            found.add(min((i for i in range(total) if i not in found), key=lambda i: abs(grid[i] - target)))
        return found
