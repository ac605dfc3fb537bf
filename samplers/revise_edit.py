"""Revisers that put another token where one stands.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import Canvas, TextFacts
from hasten.samplers.revise import RevisePolicy, ReviseState, Revision
from hasten.samplers.scores import Scores


class Edit(RevisePolicy):
    """Where the model now says something else and is sure, that is written instead (LLaDA2.1's token-to-token editing,
    arXiv 2602.08676; in diffusers `BlockRefinementScheduler(editing_threshold=0.5)`).

    A written slot of the block gets the predicted token if that is another one with confidence > `above`. When the block
    is full, it is evaluated again as long as something changes, at most `after` times. Needs a model that predicts
    tokens which it is given, not masks alone; others repeat what stands there.
    """

    kind: ClassVar[str] = "edit"
    above: float = Field(0.5, ge=0, lt=1)
    after: int = Field(16, ge=0)
    budget: int = Field(16, ge=1)

    def start(self, facts: TextFacts) -> ReviseState:
        return _EditState(self)


class _EditState(ReviseState):
    def __init__(self, policy: Edit) -> None:
        self.policy = policy
        self.steps: Tensor | None = None
        self.edited: Tensor | None = None

    def revise(self, scores: Scores, written: Tensor, may: Tensor, canvas: Canvas) -> Revision:
        other = may & scores.seen & (scores.token != canvas.ids) & (scores.confidence > self.policy.above)
        before = torch.zeros_like(canvas.step) if self.steps is None else self.steps
        self.steps = torch.where(written.any(1), 0, before + 1)  # evaluations of a full block
        self.edited = other.any(1)
        return Revision(replace=other, token=scores.token)

    def holds(self, canvas: Canvas) -> Tensor | None:
        if self.steps is None or self.edited is None:
            return None
        return ((self.steps == 0) | self.edited) & (self.steps < self.policy.after)
