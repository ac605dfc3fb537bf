"""Rules that compare an evaluation with earlier ones of the same slot.

Shapes: B texts, L slots; of one evaluation m texts with R slots each, V tokens, of which K are kept per slot. What is
kept belongs to a slot while it is open; a slot that is written, or outside the active block, has no history.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hasten.canvas import Canvas
from hasten.samplers.commit import CommitRule, CommitState
from hasten.samplers.scores import Logits, Scores, best


class Steady(CommitRule):
    """Slots that were among the `top` surest in each of the last `lasting` evaluations, with one token (CCD-DS, arXiv
    2512.02044).

    "Surest" is by the recipe's score: the paper's is the entropy, of distributions averaged over evaluations for the
    variant without this rule (`Averaged`). There is no threshold: where nothing is steady, the surest slot is
    written. The paper looks back 2 evaluations on LLaDA and 3 on Dream.
    """

    kind: ClassVar[str] = "steady"
    remembers: ClassVar[bool] = True
    top: int = Field(4, ge=1)
    lasting: int = Field(2, ge=2)

    def start(self) -> CommitState:
        return _SteadyState(self)


class _SteadyState(CommitState):
    def __init__(self, rule: Steady) -> None:
        self.rule = rule
        self.tops: list[Tensor] = []
        self.tokens: list[Tensor] = []

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        among = scores.among(canvas)
        now = best(scores.rank, among, torch.full_like(canvas.step, self.rule.top))
        steady = now if len(self.tops) == self.rule.lasting - 1 else torch.zeros_like(now)
        for top, token in zip(self.tops, self.tokens, strict=True):
            steady = steady & top & (token == scores.token)
        self.tops = [*self.tops, now][1 - self.rule.lasting :]
        self.tokens = [*self.tokens, scores.token][1 - self.rule.lasting :]
        return steady


class Settled(CommitRule):
    """Slots with c >= `above` whose distribution has changed by less than `drift` in each of the last `lasting`
    evaluations (KLASS, arXiv 2511.05664).

    Change is KL(p_t || p_t-1) in nats. Of p_t-1 the `keep` most probable tokens are stored and the rest is one
    outcome, so that what is compared is never more than the paper's KL, and equal to it for keep >= V (by the log-sum
    inequality); at 64 tokens that is 0.5 KiB per slot, where a published port stores all V in float64. Where nothing
    has settled the paper writes the surest k; put a quota beside it (`Either`) for k > 1.
    """

    kind: ClassVar[str] = "settled"
    remembers: ClassVar[bool] = True
    above: float = Field(0.6, ge=0, le=1)
    drift: float = Field(0.01, gt=0)
    lasting: int = Field(2, ge=1)
    keep: int = Field(64, ge=1)

    def start(self) -> CommitState:
        return _SettledState(self)


class _SettledState(CommitState):
    """token, known [B, L + 1, K]: most probable tokens at the last evaluation and their log-probabilities; count [B,
    L + 1]: evaluations in a row with little change, -1 where there was no evaluation. Bin L takes what is about no
    slot."""

    token: Tensor
    known: Tensor
    count: Tensor | None = None

    def __init__(self, rule: Settled) -> None:
        self.rule = rule

    def observe(self, known: Logits, canvas: Canvas) -> None:
        top = known.values.topk(min(self.rule.keep, known.values.shape[-1]), dim=-1)
        if self.count is None:
            shape = (len(canvas.ids), canvas.slots + 1, top.indices.shape[-1])
            self.token = torch.zeros(shape, dtype=torch.int64, device=canvas.ids.device)
            self.known = torch.zeros(shape, device=canvas.ids.device)
            self.count = torch.full(shape[:2], -1, device=canvas.ids.device)
        at = (known.members[:, None], known.slots)
        little = divergence(known.values, self.token[at], self.known[at]) < self.rule.drift
        count = torch.where(little, self.count[at] + 1, 0)  # 0 where there was nothing to compare with
        self.count[at] = torch.where(F.pad(canvas.eligible, (0, 1))[at], count, -1)
        self.token[at], self.known[at] = top.indices, top.values

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        assert self.count is not None, "select before observe"
        among = scores.among(canvas)
        self.count = torch.where(F.pad(among, (0, 1)), self.count, -1)
        return among & (self.count[:, :-1] >= self.rule.lasting) & (scores.confidence >= self.rule.above)


def divergence(p: Tensor, token: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats, [...], all tokens that are not named counted as one outcome, of at least 1e-7 (what float32
    can tell from nothing).

    p [..., V]: log-probabilities. token int64, q [..., K]: some tokens, and their log-probabilities under q.
    """
    named = p.gather(-1, token)
    each = torch.where(named > -float("inf"), named.exp() * (named - q), 0.0).sum(-1)
    rest, was = ((1 - x.exp().sum(-1)).clamp(min=1e-7) for x in (named, q))
    return each + rest * (rest / was).log()
