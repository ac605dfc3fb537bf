"""Revisers that take back what was written unsurely, or any slot by chance.

They go by the probability that a token had when it was written (`Canvas.confidence`), and never ask the model about written
tokens, so that models which were taught masks alone can have them.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import DONE, Canvas, TextFacts
from hasten.noise import uniform
from hasten.samplers.revise import RevisePolicy, ReviseState, Revision
from hasten.samplers.scores import Scores, best


class _Asked(ReviseState):
    """out bool [B, L]: what this step takes back; as many more slots are written in it, so that the text gains what the
    commit rule wanted."""

    out: Tensor

    def revise(self, scores: Scores, written: Tensor, may: Tensor, canvas: Canvas) -> Revision:
        return Revision(self.out)


class Outbid(RevisePolicy):
    """Written slots that were less sure then than open ones are now: these are written in their place (running confidence
    remasking, RCR, of MDPO, arXiv 2508.13148).

    A rule that takes k slots leaves n + k of the block written: of the n that are and of all open ones, those with the
    highest confidence, that of a written slot being the one it was written with. A slot that falls out is predicted anew
    like any other.

    Their code fills the whole block at each step and masks the lowest again; what is left is the same. There a slot may
    come and go for ever; here at most `budget` times, and a text keeps one more than it loses.
    """

    kind: ClassVar[str] = "outbid"
    written: ClassVar[bool] = False
    budget: int = Field(16, ge=1)

    def start(self, facts: TextFacts) -> ReviseState:
        return _OutbidState()


class _OutbidState(_Asked):
    def least(self, scores: Scores, chosen: Tensor, may: Tensor, canvas: Canvas) -> Tensor | None:
        count, among = chosen.sum(1).clamp(min=1), scores.among(canvas)
        sure = torch.where(among, scores.confidence, canvas.confidence)
        self.out = may & ~best(sure, may | among, may.sum(1) + count)
        return count + self.out.sum(1)


class Lapse(RevisePolicy):
    """Written slots are taken back by chance, and as many more are written (ReMDM, arXiv 2503.00307).

    With alpha_t, alpha_s the share of the block that is written before and after a step, a written slot is taken back with
    probability sigma, which is at most sigma_max = min(1, (1 - alpha_s) / alpha_t): "cap", min(eta, sigma_max);
    "rescale", eta sigma_max. unsure: each slot's share of it is softmax(-c) over the written slots, c the confidence that
    it was written with (their ReMDM-conf, which has "rescale" with eta = 1). late: only once at most this share of the block
    is open (their t_switch).

    They go by a clock, alpha = 1 - t, and draw the number of slots that are written, too; here alpha is what stands in the
    block, and the commit rule's number is kept. Their ReMDM-loop holds alpha over many evaluations, which does not go with
    a loop that gains a slot in each. The paper tunes eta (hundredths) for each task.
    """

    kind: ClassVar[str] = "lapse"
    written: ClassVar[bool] = False
    budget: int = Field(16, ge=1)
    schedule: Literal["cap", "rescale"] = "cap"
    eta: float = Field(0.02, ge=0, le=1)
    unsure: bool = False
    late: float = Field(1.0, gt=0, le=1)

    def start(self, facts: TextFacts) -> ReviseState:
        return _LapseState(self)


_STREAM = 1 << 41
"""Steps that no other noise about slots has (`scores.py`)."""


class _LapseState(_Asked):
    def __init__(self, policy: Lapse) -> None:
        self.policy = policy

    def least(self, scores: Scores, chosen: Tensor, may: Tensor, canvas: Canvas) -> Tensor | None:
        count = chosen.sum(1).clamp(min=1)
        stream = (-1 - _STREAM - canvas.step)[:, None]
        chance = uniform(self.seed[:, None], stream, canvas.place - canvas.start[:, None], 1)[..., 0]
        self.out = may & (chance < self._sigma(count, canvas))
        return count + self.out.sum(1)

    def _sigma(self, count: Tensor, canvas: Canvas) -> Tensor:
        """With which probability each slot is taken back, float64 [B, L]. count int64 [B]: how many the rule writes."""
        policy, done = self.policy, canvas.active & (canvas.status == DONE)
        before = done.sum(1).double()
        size = before + canvas.eligible.sum(1)
        left = (size - before - count).clamp(min=0)
        limit = (left / before.clamp(min=1)).clamp(max=1)
        sigma = limit.clamp(max=policy.eta) if policy.schedule == "cap" else policy.eta * limit
        sigma = torch.where(size - before <= policy.late * size, sigma, 0.0)[:, None].expand_as(done)
        if policy.unsure:
            sure = torch.where(done, canvas.confidence.double(), float("inf"))
            sigma = sigma * torch.softmax(-sure, 1).nan_to_num(0.0)
        return sigma
