"""Scores that mix in what earlier evaluations said of a slot.

Shapes: B texts, L slots; of one evaluation m texts with R slots each, V tokens, of which E are remembered per slot.
What is remembered belongs to a slot while it is open in the active block, and is forgotten when the slot is written.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hasten.canvas import Canvas
from hasten.samplers.scores import Draw, Logits, Score, Scores, ScoreState

MOST = 64
"""Different tokens that `Credit` remembers of a slot. With beta 0.8, one that has not come up for as many evaluations
has a credit below 1e-5."""


class Credit(Score):
    """Tokens that keep coming up gain credit: logits + alpha log(1 + C), and the confidence of that (CreditDecoding,
    arXiv 2510.06133).

    At each evaluation of an open slot C <- beta C, then C[v] += c^gamma for its most probable token v, with c its
    probability. C is zero but for tokens that were most probable once: those are all that is stored, [B, L, E] for E
    evaluations (at most 64, then the least credited is forgotten) in place of [B, L, V], with the dense result.
    """

    kind: ClassVar[str] = "credit"
    remembers: ClassVar[bool] = True
    alpha: float = Field(0.7, ge=0)
    beta: float = Field(0.8, ge=0, le=1)
    gamma: float = Field(0.2, ge=0)

    def start(self) -> ScoreState:
        return _CreditState(self)


class _CreditState(ScoreState):
    """token int64, credit float32 [B, L + 1, E]; an entry with credit 0 is free. Bin L takes what is about no
    slot."""

    def __init__(self, part: Credit) -> None:
        super().__init__(part)
        self.rates = part.alpha, part.beta, part.gamma
        self.token: Tensor | None = None
        self.credit: Tensor | None = None

    def adjust(self, logits: Logits, canvas: Canvas) -> Tensor:
        alpha, beta, gamma = self.rates
        token, credit = self._room(canvas)
        at = (logits.members[:, None], logits.slots)
        values, now = logits.values, logits.values.max(-1)
        gain = (now.values - values.logsumexp(-1)).exp() ** gamma
        mine, earned = token[at], credit[at] * beta
        same = (mine == now.indices[..., None]) & (earned > 0)
        entry = torch.where(same.any(-1), same.to(torch.uint8).argmax(-1), earned.argmin(-1))[..., None]
        had = torch.where(same.any(-1, keepdim=True), earned.gather(-1, entry), 0.0)
        mine = mine.scatter(-1, entry, now.indices[..., None])
        earned = earned.scatter(-1, entry, had + gain[..., None])
        earned = torch.where(F.pad(canvas.eligible, (0, 1))[at][..., None], earned, 0.0)
        token[at], credit[at] = mine, earned
        return values.scatter_add(-1, mine, alpha * earned.log1p())

    def note(self, chosen: Tensor, scores: Scores, canvas: Canvas) -> None:
        assert self.credit is not None, "note before adjust"
        self.credit = torch.where(F.pad(chosen, (0, 1))[..., None], 0.0, self.credit)

    def _room(self, canvas: Canvas) -> tuple[Tensor, Tensor]:
        """The stored entries, one more than at the last call: as many as there can be tokens so far."""
        if self.token is None or self.credit is None:
            shape = (len(canvas.ids), canvas.slots + 1, 1)
            self.token = torch.zeros(shape, dtype=torch.int64, device=canvas.ids.device)
            self.credit = torch.zeros(shape, device=canvas.ids.device)
        elif self.token.shape[-1] < MOST:
            self.token, self.credit = F.pad(self.token, (0, 1)), F.pad(self.credit, (0, 1))
        return self.token, self.credit


class Averaged(Score):
    """The mean of the last `over` distributions of a slot, and its entropy (Coherent Contextual Decoding, arXiv
    2512.02044).

    A token that is likely with one context and not with another loses to one that is likely with both. Of earlier
    distributions the `keep` most probable tokens are stored (all, for keep >= V: then the mean is exact), and the
    mean is normalised. The paper keeps the history of the V surest slots only; here every open slot has one.
    """

    kind: ClassVar[str] = "averaged"
    remembers: ClassVar[bool] = True
    over: int = Field(2, ge=2)
    keep: int = Field(64, ge=1)

    def start(self) -> ScoreState:
        return _AveragedState(self)


class _AveragedState(ScoreState):
    """token int64, chance float32 [B, L + 1, (over - 1) K]: tokens of earlier evaluations and their probabilities,
    the latest first. past int64 [B, L + 1]: evaluations that are stored."""

    token: Tensor
    chance: Tensor
    past: Tensor | None = None

    def __init__(self, part: Averaged) -> None:
        super().__init__(part)
        self.over, self.keep = part.over, part.keep

    def adjust(self, logits: Logits, canvas: Canvas) -> Tensor:
        now = logits.values.softmax(-1)
        top = now.topk(min(self.keep, now.shape[-1]), dim=-1)
        if self.past is None:
            shape = (len(canvas.ids), canvas.slots + 1, (self.over - 1) * top.indices.shape[-1])
            self.token = torch.zeros(shape, dtype=torch.int64, device=canvas.ids.device)
            self.chance = torch.zeros(shape, device=canvas.ids.device)
            self.past = torch.zeros(shape[:2], dtype=torch.int64, device=canvas.ids.device)
        at = (logits.members[:, None], logits.slots)
        past = self.past[at]
        recent = torch.arange(self.token.shape[-1], device=past.device) < past[..., None] * top.indices.shape[-1]
        token, chance = self.token[at], torch.where(recent, self.chance[at], 0.0)
        mean = now.scatter_add(-1, token, chance) / (past + 1)[..., None]
        self.token[at] = torch.cat([top.indices, token], -1)[..., : token.shape[-1]]
        self.chance[at] = torch.cat([top.values, chance], -1)[..., : token.shape[-1]]
        open_ = F.pad(canvas.eligible, (0, 1))[at]
        self.past[at] = torch.where(open_, (past + 1).clamp(max=self.over - 1), 0)
        return mean.log()

    def rank(self, scores: Scores, canvas: Canvas, draw: Draw) -> Tensor:
        return -scores.entropy

    def note(self, chosen: Tensor, scores: Scores, canvas: Canvas) -> None:
        assert self.past is not None, "note before adjust"
        self.past = torch.where(F.pad(chosen, (0, 1)), 0, self.past)
