"""Selectors with a budget: so many blocks, so much mass, so far above the mean.

Shapes: see `hasten.sparse_attn.blocks`. Candidates are key blocks that may be chosen: role SELECT, score above -inf.
Blocks that score +inf are read beside what is chosen. Equal scores: the block that stands first.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.errors import RecipeError
from hasten.sparse_attn.blocks import SELECT, Blocks
from hasten.sparse_attn.selectors.selector import Selector, SelectorState


def candidates(scores: Tensor, blocks: Blocks) -> Tensor:
    """What may be chosen: bool [P, Cq, Ck]."""
    return scores.isfinite() & (blocks.k.roles == SELECT)


def shares(scores: Tensor, may: Tensor) -> Tensor:
    """Estimated share of each candidate in the mass of all candidates: float32 [P, Cq, Ck], 0 for others."""
    return scores.float().masked_fill(~may, -math.inf).softmax(-1).nan_to_num(0.0)


def key_sizes(scores: Tensor, blocks: Blocks) -> Tensor:
    """Tokens of each key block, for the planes of `scores`: int32 [1 or P, 1, Ck]."""
    sizes = blocks.k.sizes
    if 1 < sizes.shape[0] < scores.shape[0]:
        sizes = sizes.repeat_interleave(scores.shape[0] // sizes.shape[0], 0)
    return sizes[:, None, :]


def falling(scores: Tensor, may: Tensor) -> Tensor:
    """Numbers of key blocks, best candidates first, others last: int64 [P, Cq, Ck]."""
    return scores.float().masked_fill(~may, -math.inf).sort(dim=-1, descending=True, stable=True).indices


def at_own_place(chosen: Tensor, order: Tensor, scores: Tensor, may: Tensor) -> Tensor:
    """`chosen` (bool, by rank) by number of block, candidates only, with what is read always."""
    order = order.expand(chosen.shape)
    found = torch.zeros_like(chosen).scatter_(-1, order, chosen)
    return (found & may) | (scores == math.inf)


def within_tokens(scores: Tensor, blocks: Blocks, share: Tensor | float) -> Tensor:
    """The best blocks of each row whose tokens come nearest to `share` of its candidates'; at least one.

    share: a number, or a tensor that broadcasts to [P, 1, 1].
    """
    may = candidates(scores, blocks)
    order = falling(scores, may)
    sizes = (key_sizes(scores, blocks) * may).float()
    planes = max(sizes.shape[0], order.shape[0])
    ranked = sizes.expand(planes, *order.shape[1:]).gather(-1, order.expand(planes, -1, -1))
    middle = ranked.cumsum(-1) - ranked / 2
    chosen = middle <= sizes.sum(-1, keepdim=True) * share
    chosen[..., 0] = True
    return at_own_place(chosen, order, scores, may)


class TopK(Selector):
    """The blocks with the highest scores: a share of the candidates, or a number.

    share: of the candidates of each row (with a causal mask, early queries have fewer), rounded up. count: as many for
    all. Exactly one is given. by: what the share is of, blocks or the tokens in them, whichever sum comes nearest; this
    differs for clusters of unequal size. At least one block is read.
    """

    kind = "top-k"
    share: float | None = Field(default=None, gt=0, le=1)
    count: int | None = Field(default=None, ge=1)
    by: Literal["blocks", "tokens"] = "blocks"

    @model_validator(mode="after")
    def _one_budget(self) -> TopK:
        if (self.share is None) == (self.count is None):
            raise RecipeError("top-k: give either share (of the candidates) or count (blocks), and only one of them.")
        if self.by == "tokens" and self.share is None:
            raise RecipeError("top-k: by = tokens goes with share; count is a number of blocks.")
        return self

    def start(self) -> SelectorState:
        return _TopK(self)


class _TopK(SelectorState):
    def __init__(self, part: TopK) -> None:
        self.part = part

    def keep(self, scores: Tensor, blocks: Blocks) -> Tensor:
        if self.part.by == "tokens":
            assert self.part.share is not None
            return within_tokens(scores, blocks, self.part.share)
        may = candidates(scores, blocks)
        rank = torch.arange(scores.shape[-1], device=scores.device)
        if self.part.count is not None:
            chosen = (rank < self.part.count).expand(scores.shape)
        else:
            chosen = rank < at_least_one(may, self.part.share or 1.0)
        return at_own_place(chosen, falling(scores, may), scores, may)


def at_least_one(may: Tensor, share: float) -> Tensor:
    """`share` of the candidates of each row, rounded up: float32 [P, Cq, 1]. 0.2 of 5 is 1, whatever floats say."""
    return (may.sum(-1, keepdim=True) * share - 1e-4).ceil().clamp(min=1)


class TopP(Selector):
    """The fewest blocks whose estimated shares add up to `p` (SVG2, SpargeAttn, XAttention, NABLA, FlexPrefill).

    floor: at least this share of the candidates, rounded up, and at least one block (SVG2: min_kc_ratio, 0.1).
    cap: at most this share of them, rounded up; None: no limit.
    """

    kind = "top-p"
    p: float = Field(default=0.9, gt=0, le=1)
    floor: float = Field(default=0.0, ge=0, le=1)
    cap: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _floor_below_cap(self) -> TopP:
        if self.cap is not None and self.floor > self.cap:
            raise RecipeError(f"top-p: a floor of {self.floor} is above the cap of {self.cap}.")
        return self

    def start(self) -> SelectorState:
        return _TopP(self)


class _TopP(SelectorState):
    def __init__(self, part: TopP) -> None:
        self.part = part

    def keep(self, scores: Tensor, blocks: Blocks) -> Tensor:
        may = candidates(scores, blocks)
        order = falling(scores, may)
        ranked = shares(scores, may).gather(-1, order)
        before = ranked.cumsum(-1) - ranked
        rank = torch.arange(scores.shape[-1], device=scores.device)
        chosen = (before < self.part.p) | (rank < at_least_one(may, self.part.floor))
        if self.part.cap is not None:
            chosen &= rank < at_least_one(may, self.part.cap)
        return at_own_place(chosen, order, scores, may)


class Above(Selector):
    """Blocks whose score is above the row's mean by `tau` standard deviations; at least the best one (Sol-Attn).

    1.0 reads about 16 % of blocks where scores are normal, 1.5 about 7 %, 2.0 about 2.3 %. The official code estimates
    mean and deviation from a diagonal or full covariance of the centroids; they are counted here.
    """

    kind = "above"
    tau: float = 1.0

    def start(self) -> SelectorState:
        return _Above(self.tau)


class _Above(SelectorState):
    def __init__(self, tau: float) -> None:
        self.tau = tau

    def keep(self, scores: Tensor, blocks: Blocks) -> Tensor:
        may = candidates(scores, blocks)
        known = scores.float().masked_fill(~may, 0.0)
        count = may.sum(-1, keepdim=True).clamp(min=1)
        mean = known.sum(-1, keepdim=True) / count
        deviation = ((known - mean).square() * may).sum(-1, keepdim=True).div_(count).sqrt_()
        best = scores.masked_fill(~may, -math.inf).argmax(-1, keepdim=True)
        found = known > mean + self.tau * deviation
        return (found.scatter(-1, best, True) & may) | (scores == math.inf)


class All(Selector):
    """Everything that a scorer does not rule out: for static patterns, whose scores are 0 or -inf."""

    kind = "all"

    def start(self) -> SelectorState:
        return _All()


class _All(SelectorState):
    def keep(self, scores: Tensor, blocks: Blocks) -> Tensor:
        return scores > -math.inf


class SelfTopP(Selector):
    """One budget for all query blocks of a head, spent where a token read brings most mass (AdaSpa's adaptive budgets).

    Pairs of blocks of a head are ranked by estimated share per token, over all its query blocks, until `share` of all
    pairs of tokens is read: rows whose mass is spread get more, rows that look at little get less. Each query block
    reads at least its best block. AdaSpa (2025) moves budget between heads, by their recall, in steps; together=True
    does so in full: all heads (and samples) of a call share one budget, and none is independent of the others.
    """

    kind = "self-top-p"
    share: float = Field(default=0.2, gt=0, le=1)
    together: bool = False

    def start(self) -> SelectorState:
        return _SelfTopP(self)


class _SelfTopP(SelectorState):
    def __init__(self, part: SelfTopP) -> None:
        self.part = part

    def keep(self, scores: Tensor, blocks: Blocks) -> Tensor:
        may = candidates(scores, blocks)
        mass = shares(scores, may)
        best = mass.argmax(-1, keepdim=True)
        sizes = key_sizes(scores, blocks).clamp(min=1)
        cost = (blocks.q.sizes[:, :, None] * sizes * may).float().expand(mass.shape)
        worth = (mass / sizes).masked_fill(~may, -1.0).scatter(-1, best, math.inf)
        shape = (1, -1) if self.part.together else (scores.shape[0], -1)
        order = worth.reshape(shape).sort(dim=-1, descending=True, stable=True).indices
        ranked = cost.reshape(shape).gather(-1, order).double()
        spent = ranked.cumsum(-1)
        chosen = spent - ranked / 2 <= ranked.sum(-1, keepdim=True) * self.part.share
        found = torch.zeros_like(chosen).scatter_(-1, order, chosen).view(scores.shape)
        return (found.scatter(-1, best, True) & may) | (scores == math.inf)
