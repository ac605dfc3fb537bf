"""Scorers that see means of blocks, or few sums over them, instead of all pairs of tokens.

Shapes: see `hasten.sparse_attn.blocks`; G groups of consecutive tokens.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from hasten.sparse_attn.blocks import NEVER, NONE, Order, block_mean, grouped
from hasten.sparse_attn.plan import Compensation
from hasten.sparse_attn.scorers.scorer import Scorer, ScorerState, View, logarithm, means, products, readable
from hasten.sparse_attn.stand_ins.compensate import block_variance, log_mass
from hasten.sparse_attn.sums import block_sums

ELEMENTS = 2**25
"""Scores that are held at a time, in elements."""


class Pooled(Scorer):
    """s = mean(q) . mean(k), scaled (MInference's block pattern, SpargeAttn, NABLA, VSA's coarse stage).

    Blocks count alike whatever their size, as in the papers, whose blocks are equal; `Centroid` adds the size.
    similarity: blocks whose mean says little are read always (SpargeAttn, section 3.3, theta; 0.6 with its cumulative
    threshold): keys by all queries, queries all keys, where the mean cosine between the tokens of the block is at or
    below it. None: never. The official code reads key blocks so judged even where a causal mask forbids; not here.
    """

    kind = "pooled"
    similarity: float | None = Field(default=None, ge=-1, le=1)

    def start(self) -> ScorerState:
        return _Pooled(self.similarity)


class _Pooled(ScorerState):
    def __init__(self, similarity: float | None) -> None:
        self.similarity = similarity

    def scores(self, view: View) -> Tensor:
        q, k = view.blocks.q, view.blocks.k
        found = products(means(view.q, q), means(view.k, k), view.scale)
        if self.similarity is not None:
            apart = similarity(view.q, q) <= self.similarity
            found.masked_fill_(apart[:, :, None], math.inf)
            apart = (similarity(view.k, k) <= self.similarity).repeat_interleave(view.groups, 0)
            found.masked_fill_(apart[:, None, :], math.inf)
        return readable(found, view)


def similarity(x: Tensor, order: Order) -> Tensor:
    """Mean cosine between all pairs of tokens of a block (a token with itself too): float32 [B * H, C].

    The mean of a block's Gram matrix of unit vectors is the squared length of their mean; no Gram matrix is needed.
    """
    return block_mean(normalize(x.float(), dim=-1), order).square().sum(-1)


class Centroid(Scorer):
    """s = mean(q) . mean(k), scaled, + log n: the mass of n keys at their mean (SVG2, section 4.2; Squeezed Attention).

    Uses the layout's centroids where it has some. variance: adds half the variance of the block's logits,
    scale^2 mean(q)^2 . var(k) / 2, without which blocks with spread keys are underrated (ours; see `Compensate`).
    """

    kind = "centroid"
    variance: bool = False

    def start(self) -> ScorerState:
        return _Centroid(self.variance)


class _Centroid(ScorerState):
    def __init__(self, variance: bool) -> None:
        self.variance = variance

    def scores(self, view: View) -> Tensor:
        q, k = means(view.q, view.blocks.q), means(view.k, view.blocks.k)
        found = products(q, k, view.scale)
        found += grouped(view.blocks.k.sizes, view.groups).float().log()[:, None, :]
        if self.variance:
            spread = block_variance(view.k, view.blocks.k, k)
            found += products(q.square(), spread, view.scale * view.scale / 2)
        return readable(found, view)


class MeanRows(Scorer):
    """The share of each key block by its mean, for every query by itself, then averaged over the queries of a block.

    A block that matters much to few queries keeps its weight; the mean query would never have seen it. Sol-Attn (2026)
    scores rows too, in its kernel, but compares the mean of their logits, which is the logit of the mean query
    (`Pooled`): shares are averaged here. It is a pass over S x Ck scores. variance: as in `Centroid`. Ours.
    """

    kind = "mean-rows"
    variance: bool = True

    def start(self) -> ScorerState:
        return _MeanRows(self.variance)


class _MeanRows(ScorerState):
    def __init__(self, variance: bool) -> None:
        self.variance = variance

    def scores(self, view: View) -> Tensor:
        q, count = view.blocks.q, view.blocks.k.count
        tables = self._tables(view)
        rows = view.q.flatten(0, 1)
        labels = q.labels()
        barred = readable(rows.new_zeros(1, q.count, count, dtype=torch.float32), view)
        found = rows.new_zeros(rows.shape[0], q.count, count, dtype=torch.float32)
        step = max(1, ELEMENTS // (rows.shape[0] * count))
        for at in range(0, rows.shape[1], step):
            own = labels[:, at : at + step]
            logits = log_mass(rows[:, at : at + step], tables, view.scale, view.groups)
            logits.masked_fill_(_of_rows(barred, own) == -math.inf, -math.inf)
            found += block_sums(logits.softmax(-1).nan_to_num_(0.0), q.bounds, at)
        found /= q.sizes.clamp(min=1)[:, :, None]
        return readable(logarithm(found), view)

    def _tables(self, view: View) -> Compensation:
        """Means of all key blocks, those that are always read too: rows that look at them have less to give."""
        order = view.blocks.k
        keys = block_mean(view.k, order)
        log_sizes = order.sizes.float().log().expand(keys.shape[0], -1)
        variances = block_variance(view.k, order, keys) if self.variance else None
        return Compensation(keys, keys, log_sizes, torch.zeros_like(log_sizes, dtype=torch.bool), variances)


def _of_rows(scores: Tensor, labels: Tensor) -> Tensor:
    """Scores of each query's block: [P1, Cq, Ck] and [P1, M] -> [P1, M, Ck]."""
    planes = max(scores.shape[0], labels.shape[0])
    index = labels.expand(planes, -1)[..., None].expand(-1, -1, scores.shape[2])
    return scores.expand(planes, -1, -1).gather(1, index)


class Antidiagonal(Scorer):
    """Sums of q.k along antidiagonals of stride x stride squares, softmax over squares, sums by block (XAttention).

    Xu et al. 2025, section 2.1. Every token enters, and the sum crosses every vertical and slash line within a square.
    stride: 8 or 16 in the paper. Squares are cut from the arranged sequence; one that lies across the border of two
    blocks counts for each by its tokens. The cost is that of q.k, divided by the stride.
    """

    kind = "antidiagonal"
    stride: int = Field(default=16, ge=1)

    def start(self) -> ScorerState:
        return _Antidiagonal(self.stride)


class _Antidiagonal(ScorerState):
    def __init__(self, stride: int) -> None:
        self.stride = stride

    def scores(self, view: View) -> Tensor:
        blocks, groups = view.blocks, view.groups
        q, k = real(view.q, blocks.q, NONE), real(view.k, blocks.k, NEVER)
        q, k = strided(q, self.stride).flip(2).flatten(2), strided(k, self.stride).flatten(2)
        of_q, of_k = self._belongs(blocks.q), grouped(self._belongs(blocks.k), groups)
        allowed = self._allowed(view) & (of_k * (blocks.k.roles != NEVER)).any(-1)[:, None, :]
        found = q.new_zeros(q.shape[0], blocks.q.count, blocks.k.count)
        step = max(1, ELEMENTS // (q.shape[1] * k.shape[1] * groups))
        for at in range(0, k.shape[0], step):
            part = slice(at * groups, (at + step) * groups)
            logits = products(q[part], k[at : at + step], view.scale / self.stride)
            logits.masked_fill_(~(allowed if allowed.shape[0] == 1 else allowed[part]), -math.inf)
            shares = logits.softmax(-1).nan_to_num_(0.0)
            rows, columns = (of if of.shape[0] == 1 else of[part] for of in (of_q, of_k))
            found[part] = torch.matmul(rows.mT, torch.matmul(shares, columns))
        found *= self.stride / blocks.q.sizes.clamp(min=1)[:, :, None]
        return readable(logarithm(found), view)

    def _belongs(self, order: Order) -> Tensor:
        """Share of each group's tokens that stand in each block: float32 [P1, G, C]."""
        labels = order.labels()
        group = torch.arange(order.length, device=labels.device) // self.stride
        found = torch.zeros(labels.shape[0], -(-order.length // self.stride) * order.count, device=labels.device)
        found.scatter_add_(1, group * order.count + labels, torch.ones_like(labels, dtype=torch.float32))
        return found.view(found.shape[0], -1, order.count) / self.stride

    def _allowed(self, view: View) -> Tensor:
        """May any query of a square read any of its keys, going by the last query and the first key?"""
        if view.mask is None:
            return torch.ones(1, 1, 1, dtype=torch.bool, device=view.q.device)
        q, k = view.blocks.q, view.blocks.k
        q_at = torch.arange(q.length, device=view.q.device)[None] if q.perm is None else q.perm
        k_at = torch.arange(k.length, device=view.q.device)[None] if k.perm is None else grouped(k.perm, view.groups)
        last = torch.arange(0, q.length, self.stride, device=view.q.device) + self.stride - 1
        return view.mask.allowed(q_at[:, last.clamp(max=q.length - 1)], k_at[:, :: self.stride], k.length)


def real(x: Tensor, order: Order, padding: int) -> Tensor:
    """x [B, H, S, D] with 0 in place of padding (blocks with that role), which may hold anything."""
    gone = (order.roles == padding)[order.labels()]
    return x.masked_fill(gone.view(-1, x.shape[1], x.shape[2], 1) if gone.shape[0] > 1 else gone[0, :, None], 0)


def strided(x: Tensor, stride: int) -> Tensor:
    """x [B, H, S, D] in groups of `stride` tokens: float32 [B * H, G, stride, D]; the last token fills up the last."""
    b, h, s, d = x.shape
    places = torch.arange(-(-s // stride) * stride, device=x.device).clamp(max=s - 1)
    return x[:, :, places].float().view(b * h, -1, stride, d)
