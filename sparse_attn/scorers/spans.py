"""Mixed spans: how far each head and each layer of a causal model looks.

Shapes: see `hasten.sparse_attn.blocks`. Positions are those of the sequence; a key block is read where any of its
keys is.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.errors import RecipeError
from hasten.part import Part
from hasten.sparse_attn.extent import positions
from hasten.sparse_attn.scorers.scorer import Scorer, ScorerState, View, readable


class Span(Part):
    """Which keys one head reads, whatever they hold."""

    @abstractmethod
    def reads(self, first: Tensor, last: Tensor, low: Tensor, high: Tensor, head: int) -> Tensor:
        """bool [P1, Cq, Ck]: does any query at positions first to last ([P1, Cq, 1], among the keys) read any key at
        positions low to high ([P1, 1, Ck])? head: number of the key head."""


class Full(Span):
    """Every key."""

    kind: ClassVar[str] = "full"

    def reads(self, first: Tensor, last: Tensor, low: Tensor, high: Tensor, head: int) -> Tensor:
        return (low <= high) & (first <= last)


class Near(Span):
    """The last `window` keys, the query's own among them, and the first `sinks`.

    The short span of MASFormer (2310.12442) and Sparse attention with sinks of LongGen (2410.01485, "attention sink");
    the A-shape of MInference.
    """

    kind: ClassVar[str] = "near"
    window: int = Field(default=1024, ge=1)
    sinks: int = Field(default=0, ge=0)

    def reads(self, first: Tensor, last: Tensor, low: Tensor, high: Tensor, head: int) -> Tensor:
        near = (high > first - self.window) & (low <= last)
        return (near | (low < self.sinks)) & (low <= high)


class Shards(Span):
    """Every `count`-th stretch of `width` keys, beginning at another one in each key head, and the last `window` keys.

    S2-Attention's heterogeneous context sharding (2407.17678): each head holds a part of the context, all heads
    together the whole of it. The blockwise stride of LongGen is the same with heads=1 (all heads hold the same
    shard). Stretches are counted from the beginning of the sequence, so that a head's cache could drop the others;
    query heads that share a key head have the same shard.
    """

    kind: ClassVar[str] = "shards"
    count: int = Field(default=8, ge=1)
    width: int = Field(default=64, ge=1)
    window: int = Field(default=1024, ge=1)
    heads: int | None = Field(default=None, ge=1)

    def reads(self, first: Tensor, last: Tensor, low: Tensor, high: Tensor, head: int) -> Tensor:
        own = head % (self.heads if self.heads is not None else self.count)
        begin, end = low // self.width, high // self.width
        shard = (own - begin) % self.count <= end - begin
        near = (high > first - self.window) & (low <= last)
        return (shard | near) & (low <= high)


class Spans(Scorer):
    """Key head h looks as far as spans[h % len(spans)]: 0 for the blocks it reads, -inf for the others.

    With the selector that keeps everything finite. Blocks are read whole where a span ends within one, so a head
    never sees less than its span. Causality is the mask's affair.
    """

    kind: ClassVar[str] = "spans"
    spans: tuple[Span, ...]

    @model_validator(mode="after")
    def _has_spans(self) -> Spans:
        if not self.spans:
            raise RecipeError("spans is empty; name at least one span (full, near, shards).")
        return self

    def start(self) -> ScorerState:
        return _Spans(self.spans)


class _Spans(ScorerState):
    def __init__(self, spans: tuple[Span, ...]) -> None:
        self.spans = spans

    def scores(self, view: View) -> Tensor:
        b, hq, hk = view.q.shape[0], view.q.shape[1], view.k.shape[1]
        offset = view.mask.offset if view.mask is not None else view.k.shape[2] - view.q.shape[2]
        first, last = ((x.long() + offset)[:, :, None] for x in positions(view.blocks.q))
        low, high = (x.long()[:, None, :] for x in positions(view.blocks.k))
        shared = first.shape[0] == low.shape[0] == 1
        if shared and len(self.spans) == 1 and not isinstance(self.spans[0], Shards):
            return _scores(self.spans[0].reads(first, last, low, high, 0), view)
        first, last = (x.expand(b * hq, -1, -1).view(b, hk, view.groups, -1, 1) for x in (first, last))
        low, high = (x.expand(b * hk, -1, -1).view(b, hk, 1, 1, -1) for x in (low, high))
        found = []
        for head in range(hk):
            span, one = self.spans[head % len(self.spans)], slice(head, head + 1)
            reads = span.reads(first[:, one], last[:, one], low[:, one], high[:, one], head)
            found.append(reads.expand(b, 1, view.groups, first.shape[3], low.shape[4]))
        return _scores(torch.cat(found, 1).reshape(b * hq, first.shape[3], low.shape[4]), view)


def _scores(reads: Tensor, view: View) -> Tensor:
    return readable(torch.zeros(reads.shape, device=reads.device).masked_fill(~reads, -math.inf), view)


class Depth(Part):
    """A stretch of a model's layers, as shares of its depth: layer l of L is in it when begin <= (l + 1/2) / L <
    end."""

    begin: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)

    def holds(self, layer: int, layers: int) -> bool:
        """Is layer number `layer` of `layers` in it?"""
        return self.begin <= (layer + 0.5) / layers < self.end
