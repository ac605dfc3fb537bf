"""Commit rules that write more than is sure, because a reviser takes back what is wrong.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import Canvas
from hasten.samplers.commit import CommitRule, CommitState
from hasten.samplers.scores import Scores, best


class WideIn(CommitRule):
    """All slots with confidence > `above`, but only the surest of many (WINO, arXiv 2507.18578).

    Of m open slots of the block at most floor(share m) are written, but `least` to `most` of them at any rate. Goes with
    the reviser `NarrowOut`. The paper's numbers: above 0.6 (LLaDA on most tasks), share 0.7, 5 to 20.
    """

    kind: ClassVar[str] = "wide-in"
    above: float = Field(0.6, ge=0, lt=1)
    share: float = Field(0.7, gt=0, le=1)
    least: int = Field(5, ge=1)
    most: int = Field(20, ge=1)

    def start(self) -> CommitState:
        return _WideInState(self)


class _WideInState(CommitState):
    def __init__(self, rule: WideIn) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        among = scores.among(canvas)
        limit = (canvas.eligible.sum(1) * self.rule.share).long().clamp(min=self.rule.least)
        count = torch.minimum(limit, torch.full_like(limit, self.rule.most))
        return best(scores.confidence, among & (scores.confidence > self.rule.above), count)
