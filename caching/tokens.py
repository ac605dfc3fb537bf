"""Tokens: which of them run through the blocks at a step at which the blocks are otherwise left out."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.part import Part
from hasten.step import Step


class Tokens(Part):
    """Family of choices. A skipped step computes the chosen tokens and lets a forecast stand in for the others.

    This is the place for every timestep-dependent width along the tokens: `count` says how many run at a step,
    `pick` says which. They are chosen at a computed step, for the skipped ones behind it: there they run beside all the
    others and once more among themselves, which tells what they lack without the rest.
    """

    def count(self, step: Step, num: int) -> int:
        """How many of `num` tokens run at `step`; 0 for none. A host number, so that shapes need no synchronisation."""
        raise NotImplementedError(f"{type(self).__name__} has no count().")

    def pick(self, count: int, now: Tensor, reference: Tensor | None) -> Tensor:
        """Indices of `count` tokens, int64, shape [count], each once, on the device of `now`.

        now, reference: the stream [batch, tokens, channels] where it enters the blocks at this computed step and at
        the one before, None where there was none. All rows of the batch share one choice.
        """
        raise NotImplementedError(f"{type(self).__name__} has no pick().")


class MovedTokens(Tokens):
    """The tokens whose stream moved furthest between the last two computed steps; evenly spread ones at the first.

    The token-wise mode of SADA (arXiv 2507.17135) and the timestep-dependent width of DyDiT (arXiv 2410.03456), with
    training left out. SADA judges tokens by the curvature of the sampling path and merges the rest; ours judges by
    sum |now - reference| over channels and batch, and what is not chosen keeps its forecast residual. The chosen
    tokens attend to one another only; what they lacked of the rest at the last computed step is added.
    early, late: share that runs at the first and at the last step, straight between.
    """

    kind: ClassVar[str] = "moved"
    early: float = Field(0.5, ge=0, le=1)
    late: float = Field(0.5, ge=0, le=1)

    def count(self, step: Step, num: int) -> int:
        way = step.index / max(1, step.total - 1)
        return min(num, math.ceil((self.early + (self.late - self.early) * way) * num))

    def pick(self, count: int, now: Tensor, reference: Tensor | None) -> Tensor:
        if reference is None:
            return torch.arange(count, device=now.device) * now.shape[1] // max(1, count)
        moved = (now - reference).float().abs().sum(dim=(0, 2))
        indices: Tensor = torch.topk(moved, count).indices
        return indices.sort().values
