"""The closed loop: what a head reads follows from how much of its mass that was.

Shapes: see `hasten.sparse_attn.blocks`.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.errors import RecipeError
from hasten.sparse_attn.blocks import Blocks
from hasten.sparse_attn.select import Selector, SelectorState
from hasten.sparse_attn.select_top import within_tokens


class TargetRecall(Selector):
    """Reads so many tokens that `target` of each head's softmax mass is read exactly.

    After each choice that share, rho, is measured on `samples` queries of every plane (see `recall`). A plane's share of tokens is multiplied by ((1 - rho) / (1 - target)) ^ gain, by at
    least 1/2 and at most 2, and stays between `least` and 1. The mass left out falls about as a power of what is read,
    so this settles; gain 0.5 is slow enough for rho that lags a step behind.

    A plane with rho below `floor` is read densely for the next `rest` calls, then tried with two to four times the share:
    what was chosen for it meant nothing. first: share at the start. Ours; no paper.
    """

    kind = "target-recall"
    target: float = Field(default=0.95, gt=0, lt=1)
    first: float = Field(default=0.2, gt=0, le=1)
    least: float = Field(default=0.02, gt=0, le=1)
    floor: float = Field(default=0.5, ge=0, lt=1)
    gain: float = Field(default=0.5, gt=0, le=1)
    rest: int = Field(default=4, ge=1)
    samples: int = Field(default=64, ge=1)

    @property
    def probes(self) -> int:
        return self.samples

    @model_validator(mode="after")
    def _floor_below_target(self) -> TargetRecall:
        if self.floor >= self.target:
            raise RecipeError(f"target-recall: a floor of {self.floor} has to be below the target of {self.target}.")
        return self

    def start(self) -> SelectorState:
        return TargetRecallState(self)


class TargetRecallState(SelectorState):
    """share: float32 [P], of the tokens that each plane reads. resting: int32 [P], dense calls to come."""

    def __init__(self, part: TargetRecall) -> None:
        self.part = part
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
        rho = rho.float().reshape(-1).nan_to_num(part.target)
        dense = self.resting > 0
        step = ((1 - rho).clamp(min=1e-6) / (1 - part.target)).pow(part.gain)
        lost = ~dense & (rho < part.floor)
        step = torch.where(dense, 1.0, torch.where(lost, step.clamp(2.0, 4.0), step.clamp(0.5, 2.0)))
        self.share = (self.share * step).clamp(part.least, 1.0)
        self.resting = torch.where(lost, part.rest, (self.resting - 1).clamp(min=0)).int()

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
