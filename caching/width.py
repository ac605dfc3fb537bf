"""Width: how many attention heads and feed-forward channels of each block run at a step, and which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.caching.histories import Histories, Key
from hasten.drift import Rule
from hasten.errors import RecipeError
from hasten.forecast import Forecast, Hold
from hasten.part import Part
from hasten.recipe import ReusePolicy
from hasten.step import Step


@dataclass(frozen=True, slots=True)
class Shares:
    """Share of the attention heads and of the feed-forward channels of one block that run, 0 to 1."""

    heads: float = 1.0
    channels: float = 1.0


class Width(Part):
    """Family of widths: the place for a router or a table that was trained or searched for one model.

    A trained router that is a function of the time and the block alone (DyDiT's is) can be asked once per step and
    block here, or evaluated beforehand and written down as a `WidthTable`.
    """

    def at(self, step: Step, block: int, num: int) -> Shares:
        """What runs of block `block` of `num`, counted from 0 through all block lists, at `step`. Host numbers."""
        raise NotImplementedError(f"{type(self).__name__} has no at().")


class StraightWidth(Width):
    """The same share for all blocks, straight from `early` at the first step to `late` at the last.

    DyDiT (arXiv 2410.03456) learns that early, noisy steps need less width. heads, channels: which of the two are
    narrowed.
    """

    kind: ClassVar[str] = "straight"
    early: float = Field(0.5, ge=0, le=1)
    late: float = Field(1.0, ge=0, le=1)
    heads: bool = True
    channels: bool = True

    def at(self, step: Step, block: int, num: int) -> Shares:
        share = self.early + (self.late - self.early) * step.index / max(1, step.total - 1)
        return Shares(share if self.heads else 1.0, share if self.channels else 1.0)


class WidthTable(Width):
    """Shares by block and by stage of the run, as a router that was trained for one model gives them.

    heads, channels: one row per stage, the stages being equal parts of the steps; one share per block in a row, or one
    for all blocks. Empty: all of them run.
    """

    kind: ClassVar[str] = "table"
    heads: tuple[tuple[float, ...], ...] = ()
    channels: tuple[tuple[float, ...], ...] = ()

    @model_validator(mode="after")
    def _shares(self) -> WidthTable:
        for name, rows in (("heads", self.heads), ("channels", self.channels)):
            if any(not row or not all(0 <= share <= 1 for share in row) for row in rows):
                raise ValueError(f"{name} must have shares between 0 and 1, at least one in each row, got {rows}")
        return self

    def at(self, step: Step, block: int, num: int) -> Shares:
        return Shares(self._look_up(self.heads, step, block, num), self._look_up(self.channels, step, block, num))

    @staticmethod
    def _look_up(rows: Sequence[Sequence[float]], step: Step, block: int, num: int) -> float:
        if not rows:
            return 1.0
        row = rows[min(len(rows) - 1, step.index * len(rows) // max(1, step.total))]
        if len(row) not in (1, num):
            raise RecipeError(
                f"reuse.width has {len(row)} shares in a row, and this network has {num} blocks; give one per block, or"
                " a single one for all."
            )
        return row[block if len(row) > 1 else 0]


class WidthReuse(ReusePolicy):
    """Run only the most important heads and channels of each block; the rest is left out, or forecast.

    DyDiT (arXiv 2410.03456) trains a router and the weights together, and what its router turns off contributes
    nothing. This is the hook for such a router (`Width`); a network that was not trained for it loses quality.

    width: how much runs. order: which: "norm" by the size of the weights that lead in and out, largest first; "measured" by the size
    of what each of them added to the output at the first evaluation of the session; "stored" as they are stored, for weights that a training
    has sorted. rule: None leaves the rest out at every step, as in the paper. Otherwise the steps that the rule
    computes run in full, and a `forecast` of what the rest added there stands in until the next one (ours). It must be
    a schedule, because nothing is measured. A full step runs both parts one after the other, so it rounds otherwise.
    """

    kind: ClassVar[str] = "width"
    leaves_out: ClassVar[bool] = True
    width: Width = StraightWidth()
    order: Literal["norm", "measured", "stored"] = "norm"
    rule: Rule | None = None
    forecast: Forecast = Hold()

    @model_validator(mode="after")
    def _schedules_only(self) -> WidthReuse:
        if self.rule is not None and (self.rule.needs_signal or self.rule.needs_errors):
            raise RecipeError(
                f"reuse.rule = {self.rule.kind!r} compares a signal, and width measures none; allowed are schedules"
                " (every, window, spread, listed), or no rule."
            )
        return self

    def start(self, times: Sequence[float] = ()) -> WidthState:
        """Fresh state for one run of one network. times: `Step.time` of each step, where known."""
        return WidthState(self, times)


class WidthState:
    """State of `WidthReuse` for one run: one decision per step; per branch and module, a forecast of the rest."""

    def __init__(self, policy: WidthReuse, times: Sequence[float] = ()) -> None:
        self.policy = policy
        self.rests = Histories(policy.forecast)
        self.full = True
        self._rule = None if policy.rule is None else policy.rule.start(times)
        self._decided = -1
        self._asked: Step | None = None

    def begin(self, step: Step) -> None:
        """An evaluation begins; the first one of a step decides for all its branches."""
        if step.index == self._decided:
            return
        self._decided = step.index
        poisoned = self.rests.drop_poisoned()  # a NaN or Inf was computed: run in full, and learn afresh
        self.full = self._rule is not None and (bool(poisoned) or not self._rule.skip(step, None))
        if self.full or self._rule is None:
            self._asked = step  # what the rest added is known for the width at which it was left out

    @property
    def holds(self) -> bool:
        """Does something stand in for the rest, which is left out otherwise?"""
        return self._rule is not None

    def shares(self, step: Step, block: int, num: int) -> Shares:
        """Width of a block at `step`: where something stands in for the rest, that of the last full step."""
        return self.policy.width.at(self._asked or step, block, num)

    def rests_of(self, step: Step, site: str, key: Key) -> list[Tensor] | None:
        """What stands in for the heads or channels of `site` that do not run; None where nothing is known of them."""
        return self.rests.estimate(step.branch, site, key, step.time)

    def learn(self, step: Step, site: str, key: Key, rests: list[Tensor]) -> None:
        """`site` ran in full; `rests` is what those that may be left out added to each of its outputs."""
        self.rests.store(step.branch, site, key, step.time, rests)


def kept(share: float, num: int) -> int:
    """How many of `num` heads or channels run for `share`; at least one, because nothing can be multiplied by none."""
    return min(num, max(1, math.ceil(share * num - 1e-9)))


def ranked(importance: Tensor) -> Tensor:
    """Indices [num] of `importance` [num], the largest first; ties in stored order."""
    indices: Tensor = torch.sort(importance.float(), descending=True, stable=True).indices
    return indices
