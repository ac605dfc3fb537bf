"""Tokens: which of them run through the blocks at a step at which the blocks are otherwise left out."""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from hasten.part import Part
from hasten.step import Step


class TokenState(Protocol):
    """What one branch has seen of the stream that enters one piece of blocks."""

    def see(self, step: Step, stream: Tensor, *, computed: bool) -> None:
        """The piece is entered by `stream` [batch, tokens, channels] at `step`, to be computed or left out."""

    def pick(self, count: int) -> Tensor:
        """Indices of `count` tokens of the stream seen last, int64 [count], each once, ascending, on its device.

        All rows of the batch share one choice.
        """

    def tensors(self) -> list[Tensor]:
        """What is held, so that bytes can be counted."""


class Tokens(Part):
    """Family of choices. A skipped step computes the chosen tokens and lets a forecast stand in for the others.

    This is the place for every timestep-dependent width along the tokens: `count` says how many are chosen, `pick` of
    the running state says which. They are chosen at a computed step, for the skipped ones behind it: there they run
    beside all the others and once more among themselves, which tells what they lack without the rest.
    """

    def count(self, step: Step, num: int) -> int:
        """How many of `num` tokens to choose at `step`; 0 for none. A host number: shapes need no synchronisation."""
        raise NotImplementedError(f"{type(self).__name__} has no count().")

    def runs(self, step: Step, change: float | None) -> bool:
        """Do the chosen tokens run at the skipped `step`? change: what the rule decided on; None where it needs none."""
        return True

    def start(self) -> TokenState:
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class MovedTokens(Tokens):
    """The tokens whose stream moved furthest between the last two computed steps; evenly spread ones at the first.

    After the timestep-dependent width of DyDiT (arXiv 2410.03456) along the tokens, with training left out. Judged by
    sum |now - before| over channels and batch; what is not chosen keeps its forecast residual. The chosen tokens
    attend to one another only; what they lacked of the rest at the last computed step is added.
    early, late: share that runs at the first and at the last step, straight between.
    """

    kind: ClassVar[str] = "moved"
    early: float = Field(0.5, ge=0, le=1)
    late: float = Field(0.5, ge=0, le=1)

    def count(self, step: Step, num: int) -> int:
        way = step.index / max(1, step.total - 1)
        return min(num, math.ceil((self.early + (self.late - self.early) * way) * num))

    def start(self) -> TokenState:
        return _Moved()


class _Moved:
    def __init__(self) -> None:
        self.time: float | None = None
        self.now: Tensor | None = None
        self.before: Tensor | None = None

    def see(self, step: Step, stream: Tensor, *, computed: bool) -> None:
        if not computed:
            return
        if self.now is None or self.now.shape != stream.shape:
            self.before = None
        elif step.time != self.time:  # Heun-type solvers evaluate a time twice: the newer one counts
            self.before = self.now
        self.time, self.now = step.time, stream

    def pick(self, count: int) -> Tensor:
        assert self.now is not None
        if self.before is None:
            return evenly(count, self.now)
        return most((self.now - self.before).float().abs().sum(dim=(0, 2)), count)

    def tensors(self) -> list[Tensor]:
        return [stream for stream in (self.now, self.before) if stream is not None]


def evenly(count: int, stream: Tensor) -> Tensor:
    """Indices of `count` tokens of [batch, tokens, channels], spread evenly."""
    return torch.arange(count, device=stream.device) * stream.shape[1] // max(1, count)


def most(score: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` tokens with the largest score [tokens]."""
    indices: Tensor = torch.topk(score, count).indices
    return indices.sort().values
