"""The closed loop: what a head reads follows from how much of its mass that was.

Shapes: see `hasten.sparse_attn.blocks`.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.errors import RecipeError
from hasten.sparse_attn.blocks import Blocks
from hasten.sparse_attn.selectors.selector import Selector, SelectorState
from hasten.sparse_attn.selectors.top import within_tokens

HIGHEST = 0.999
"""Largest target that an account gives: beyond it a share is hardly to be told from all."""


class TargetRecall(Selector):
    """Reads so many tokens that `target` of each head's softmax mass is read exactly.

    After each choice that share, rho, is measured on `samples` queries of every plane (see `recall`). The mass that is left
    out is taken to be (1 - share) ^ p, where p follows from this call; a plane's share goes `gain` of the way (by ratio) to
    where that reaches the target, by at least 1/2 and at most 2, and stays between `least` and 1. On synthetic heads at
    a target of 0.95, |rho - target| is 0.01 or less on average from the tenth call on (benchmarks/attention_parts.py);
    a plain ratio of what is left out never settled on diffuse heads.

    A plane with rho below `floor` is read densely for the next `rest` calls, then tried with 1.5 to 8 times the share:
    what was chosen for it meant nothing. first: share at the start. Ours; no paper.

    lowest: in a run that keeps an account of its errors the target is what that account can afford, between `lowest` and
    `HIGHEST`, and `target` only until it says so; None: `target` throughout.
    """

    kind = "target-recall"
    target: float = Field(default=0.95, gt=0, lt=1)
    first: float = Field(default=0.2, gt=0, le=1)
    least: float = Field(default=0.02, gt=0, le=1)
    floor: float = Field(default=0.5, ge=0, lt=1)
    gain: float = Field(default=0.7, gt=0, le=1)
    rest: int = Field(default=4, ge=1)
    samples: int = Field(default=64, ge=1)
    lowest: float | None = Field(default=None, gt=0, lt=1)

    @property
    def probes(self) -> int:
        return self.samples

    @property
    def follows(self) -> bool:
        return self.lowest is not None

    @model_validator(mode="after")
    def _floor_below_target(self) -> TargetRecall:
        least = self.target if self.lowest is None else min(self.target, self.lowest)
        if self.floor >= least:
            raise RecipeError(f"target-recall: a floor of {self.floor} has to be below the target of {least}.")
        return self

    def start(self) -> SelectorState:
        return TargetRecallState(self)


class TargetRecallState(SelectorState):
    """share: float32 [P], of the tokens that each plane reads. resting: int32 [P], dense calls to come. target: of now."""

    def __init__(self, part: TargetRecall) -> None:
        self.part, self.target = part, part.target
        self.share = torch.full((1,), part.first)
        self.resting = torch.zeros(1, dtype=torch.int32)
        self._chosen = False

    def keep(self, scores: Tensor, blocks: Blocks) -> Tensor:
        self._chosen = True
        self._match(scores.shape[0], scores.device)
        share = torch.where(self.resting > 0, 1.0, self.share)
        return within_tokens(scores, blocks, share[:, None, None])

    def observe(self, rho: Tensor) -> None:
        """What was read exactly of each plane, rho [P]. Planes without queries (not a number) stay as they are.

        Only the first time after a choice: later steps and other branches that use it again tell nothing of the next.
        """
        if not self._chosen:
            return
        self._chosen = False
        self._match(rho.numel(), rho.device)
        part = self.part
        rho = rho.float().reshape(-1).nan_to_num(self.target)
        dense = self.resting > 0
        lost = ~dense & (rho < part.floor)
        step = (self._wanted(rho) / self.share).pow(part.gain)
        step = torch.where(dense, 1.0, torch.where(lost, step.clamp(1.5, 8.0), step.clamp(0.5, 2.0)))
        self.share = (self.share * step).clamp(part.least, 1.0)
        self.resting = torch.where(lost, part.rest, (self.resting - 1).clamp(min=0)).int()

    def aim(self, recall: float) -> None:
        """Move the target. Where the share was measured for another one, what is left out is taken to follow the same power."""
        if self.part.lowest is not None:
            self.target = min(max(recall, self.part.lowest), HIGHEST)

    def _wanted(self, rho: Tensor) -> Tensor:
        """The share that would reach the target if what is left out were (1 - share) ^ p, with the p of this call."""
        left_out = torch.log1p(-rho.clamp(1e-4, 1 - 1e-6))
        return 1 - torch.exp(math.log(1 - self.target) * torch.log1p(-self.share.clamp(max=0.995)) / left_out)

    def _match(self, planes: int, device: torch.device) -> None:
        """As many planes as the call has; another number of them (another batch) starts anew."""
        if self.share.device != device:
            self.share, self.resting = self.share.to(device), self.resting.to(device)
        if planes == self.share.shape[0] or planes == 1:
            return
        if self.share.shape[0] == 1:
            self.share, self.resting = self.share.expand(planes), self.resting.expand(planes)
        else:
            self.share = self.share.new_full((planes,), self.part.first)
            self.resting = self.resting.new_zeros(planes)
