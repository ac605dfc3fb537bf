"""Static scorers: which pairs of blocks are read, told from where their tokens stand, whatever they hold.

Shapes: see `hasten.sparse_attn.blocks`. Scores are 0 (read) or -inf. A rule about single tokens is applied to blocks
by the ranges that they span: a pair is read where any of its tokens may see any other. What is read is never less than
what the rule says; it is just that where blocks are whole tiles of the rule, and more by less than a block elsewhere.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.blocks import Blocks, Order, grouped
from hasten.sparse_attn.extent import extents
from hasten.sparse_attn.scorers.scorer import Scorer, ScorerState, View, readable
from hasten.sparse_attn.segments import Segment, Tokens

Span = tuple[Tensor, Tensor]
"""Smallest and largest value of one property over the tokens of each block: int32, of shapes that broadcast."""


class Where(NamedTuple):
    """Ranges that blocks span, within a segment. As queries [P1, Cq, 1], as keys [P1, 1, Ck].

    segment: number of the segment. place: position in the sequence. token: position in the segment. frame, row, column:
    in its grid. cell: row * width + column. later: cell * frames + frame, the position where time runs fastest.
    """

    segment: Span
    place: Span
    token: Span
    frame: Span
    row: Span
    column: Span
    cell: Span
    later: Span

    @property
    def axes(self) -> tuple[Span, Span, Span]:
        """frame, row, column."""
        return self.frame, self.row, self.column


@dataclass(frozen=True, slots=True)
class Scene:
    """One segment of both sides. grid: (frames, height, width) of queries and of keys; None: these tokens have none."""

    q: Where
    k: Where
    q_segment: Segment
    k_segment: Segment
    blocks: Blocks
    groups: int

    def grid(self, name: str) -> tuple[int, int, int]:
        """The grid of both sides; a `UsageError` where there is none, or two. name: the scorer that asks."""
        grid = self.q_segment.grid
        if grid is None or grid != self.k_segment.grid:
            raise UsageError(
                f"The scorer {name} needs the frames, height and width of the tokens, the same for queries and keys;"
                f" segment {self.q_segment.name!r} has {grid} and {self.k_segment.grid}. Give the segments a grid"
                " (hasten.sparse_attn.segments.video), or use a scorer that needs none (pooled, centroid, a-shape)."
            )
        return grid


class Static(Scorer):
    """Base of the static scorers: one method that says which pairs of blocks of a segment are read.

    Pairs of blocks of different segments are read: no rule says anything about them.
    """

    def start(self) -> ScorerState:
        return _Static(self)

    @abstractmethod
    def reads(self, scene: Scene) -> Tensor:
        """bool, broadcastable to [P1, Cq, Ck]: what is read if both blocks belong to this segment."""


class _Static(ScorerState):
    """Keeps the last scores as long as the blocks stay the same object."""

    def __init__(self, part: Static) -> None:
        self.part = part
        self._blocks: Blocks | None = None
        self._scores: Tensor | None = None

    def scores(self, view: View) -> Tensor:
        if self._scores is None or self._blocks is not view.blocks:
            self._blocks, self._scores = view.blocks, self._score(view)
        return self._scores

    def _score(self, view: View) -> Tensor:
        q = where(view.blocks.q, view.q_tokens, view.mask.offset if view.mask is not None else 0)
        k = where(view.blocks.k, view.k_tokens)
        q = Where(*((low[:, :, None], high[:, :, None]) for low, high in q))
        k = Where(*(tuple(grouped(x, view.groups)[:, None, :] for x in span) for span in k))  # type: ignore[arg-type]
        reads = torch.ones_like(q.place[0] + k.place[0], dtype=torch.bool)
        pairs = zip(view.q_tokens.segments, view.k_tokens.segments, strict=False)
        for number, (q_segment, k_segment) in enumerate(pairs):
            if q_segment.queries != "sparse" or k_segment.keys != "select" or not q_segment.length:
                continue
            within = (q.segment[0] == number) & (q.segment[1] == number)
            within = within & (k.segment[0] == number) & (k.segment[1] == number)
            found = self.part.reads(Scene(q, k, q_segment, k_segment, view.blocks, view.groups))
            reads = torch.where(within, found, reads)
        scores = torch.zeros(reads.shape, device=reads.device).masked_fill_(~reads, -math.inf)
        return readable(scores, view)


def where(order: Order, tokens: Tokens, offset: int = 0) -> Where:
    """Ranges of the blocks of one side: each [P1, C]. offset: position of the first token, as a mask counts."""
    low, high = extents(order, _properties(tokens, offset, order.bounds.device))
    return Where(*((low[:, number], high[:, number]) for number in range(low.shape[1])))


def _properties(tokens: Tokens, offset: int, device: torch.device) -> Tensor:
    """The properties that `Where` names, of every token: int32 [8, S]."""
    found = []
    for number, (start, segment) in enumerate(zip(tokens.starts, tokens.segments, strict=True)):
        own = torch.arange(segment.length, dtype=torch.int32, device=device)
        frames, height, width = segment.grid if segment.grid is not None else (1, 1, max(segment.length, 1))
        area = height * width
        frame, cell = own // max(area, 1), own % max(area, 1)
        row, column = cell // max(width, 1), cell % max(width, 1)
        place, later = own + start + offset, cell * frames + frame
        found.append(torch.stack([torch.full_like(own, number), place, own, frame, row, column, cell, later]))
    return torch.cat(found, 1)


def gap(a: Span, b: Span) -> Tensor:
    """Smallest distance between a value of one range and one of the other; 0 where they overlap."""
    return torch.maximum(a[0] - b[1], b[0] - a[1]).clamp(min=0)


def tiles(span: Span, size: int) -> Span:
    """The numbers of the tiles of `size` that a range touches. Blocks without tokens stay far away."""
    return span[0] // size, span[1] // size
