"""Layouts: in which order tokens stand, and where one block ends and the next begins.

Shapes: see `hasten.sparse_attn.blocks`; n tokens of one segment.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.errors import RefusedError, UsageError
from hasten.part import Part
from hasten.sparse_attn.blocks import ALWAYS, DENSE, NEVER, NONE, SELECT, SPARSE, Blocks, Order, uniform
from hasten.sparse_attn.segments import Segment, Tokens

EDGE = 64
"""Tokens per block of segments that no layout orders (text, references)."""

Grid = tuple[int, int, int]
"""Frames, height and width in tokens."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One segment in a layout's order. perm: int64 [P1, n] within the segment, None for its own order; bounds: int32
    [P1, C + 1], from 0 to n. means: float32 [P1, C, D], where known. always: bool [C], blocks that all queries read
    (keys set aside as outliers); None: none."""

    perm: Tensor | None
    bounds: Tensor
    means: Tensor | None = None
    always: Tensor | None = None


class Layout(Part):
    """Base of the layouts. `start()` gives the state of one run, branch and attention site."""

    @abstractmethod
    def start(self) -> LayoutState:
        """Fresh state."""


class Blocked(Layout):
    """Base of the layouts whose blocks have one size.

    block: tokens per block, the last one shorter. q_block: the same for queries; None: `block`.
    """

    block: int = Field(64, ge=1)
    q_block: int | None = Field(None, ge=1)

    def size(self, side: str) -> int:
        """Tokens per block of "q" or "k"."""
        return self.q_block if side == "q" and self.q_block is not None else self.block


class LayoutState:
    """Orders one segment of one side; the base class puts the segments of a sequence together."""

    def arrange(self, x: Tensor, segment: Segment, side: str) -> Arrangement:
        """The order of x [B, H, n, D], the tokens of one segment. side: "q" or "k"."""
        raise NotImplementedError

    def num_bytes(self) -> int:
        """Bytes held for later steps."""
        return 0

    def blocks(self, q: Tensor, k: Tensor, q_tokens: Tokens, k_tokens: Tokens) -> Blocks:
        """Blocks of q [B, Hq, Sq, D] and k [B, Hk, Sk, D], whose segments are given.

        Raises `UsageError` where the segments do not add up to the tensor, and `RefusedError` where the layout needs
        something that the segments lack (a grid).
        """
        return Blocks(self._order(q, q_tokens, "q"), self._order(k, k_tokens, "k"))

    def _order(self, x: Tensor, tokens: Tokens, side: str) -> Order:
        if tokens.length != x.shape[2] or not tokens.length:
            raise UsageError(
                f"The segments of {side} add up to {tokens.length} tokens and {side} has {x.shape[2]}; both must be"
                " equal and more than 0. Give one segment for every range of the sequence, text and padding included."
            )
        parts = [
            self._place(x[:, :, start : start + segment.length], segment, start, side)
            for start, segment in zip(tokens.starts, tokens.segments, strict=True)
            if segment.length
        ]
        return join(parts, x)

    def _place(self, x: Tensor, segment: Segment, start: int, side: str) -> Placed:
        ordered = segment.queries == "sparse" and segment.keys == "select" and segment.valid is None
        found = self.arrange(x, segment, side) if ordered else edge(segment, x)
        roles = torch.full((found.bounds.shape[1] - 1,), role_of(segment, side), dtype=torch.int8, device=x.device)
        if side == "k" and found.always is not None:
            roles = roles.masked_fill(found.always, ALWAYS)
        if segment.valid is not None:
            roles[-1] = NONE if side == "q" else NEVER
        return Placed(found, roles, start, segment.length)


class StaticState(LayoutState):
    """State of layouts that look at lengths and grids only: each order is made once, on the host, and kept."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, Grid | None, str, torch.device], Arrangement] = {}

    def order(self, segment: Segment, side: str) -> Arrangement:
        """The order of one segment, on the CPU, for all planes."""
        raise NotImplementedError

    def arrange(self, x: Tensor, segment: Segment, side: str) -> Arrangement:
        key = (segment.length, segment.grid, side, x.device)
        if key not in self._made:
            found = self.order(segment, side)
            perm = found.perm.to(x.device) if found.perm is not None else None
            self._made[key] = replace(found, perm=perm, bounds=found.bounds.to(x.device))
        return self._made[key]

    def num_bytes(self) -> int:
        held = [t for found in self._made.values() for t in (found.perm, found.bounds) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)


def role_of(segment: Segment, side: str) -> int:
    """The role of a segment's blocks on one side."""
    if side == "q":
        return {"sparse": SPARSE, "dense": DENSE, "none": NONE}[segment.queries]
    return {"select": SELECT, "always": ALWAYS, "never": NEVER}[segment.keys]


def edge(segment: Segment, x: Tensor) -> Arrangement:
    """Blocks of `EDGE` tokens in the segment's own order; with `valid`, what lies behind it is one last block."""
    bounds = uniform(segment.length, EDGE, x.device)
    if segment.valid is None:
        return Arrangement(None, bounds)
    valid = segment.valid.to(x.device, torch.int32).repeat_interleave(x.shape[1])[:, None]
    ends = bounds.new_full((valid.shape[0], 1), segment.length)
    return Arrangement(None, torch.cat([torch.minimum(bounds, valid), ends], 1))


def grid_of(segment: Segment, layout: str) -> Grid:
    """The grid of a segment; `RefusedError` where it has none. layout: who asks."""
    if segment.grid is None:
        raise RefusedError(
            f"Layout {layout!r} orders tokens by their place in a video or an image, and segment {segment.name!r} of"
            f" {segment.length} tokens has no grid. Give one (`segments.video(frames, height, width)`, in tokens), or use a"
            " layout that needs none: identity, kmeans, tree, lsh."
        )
    return segment.grid


@dataclass(frozen=True, slots=True)
class Placed:
    """An arranged segment at its place in the sequence. roles: int8 [C]; start, length: tokens."""

    found: Arrangement
    roles: Tensor
    start: int
    length: int


def join(parts: Sequence[Placed], x: Tensor) -> Order:
    """One `Order` of x [B, H, S, D] out of its consecutive segments.

    Perm and bounds are each shared by all planes where every segment's are.
    """
    starts = _side_by_side([part.found.bounds[:, :-1] + part.start for part in parts])
    end = starts.new_full((starts.shape[0], 1), x.shape[2])
    roles = torch.cat([part.roles for part in parts])
    return Order(_perm(parts, x), torch.cat([starts, end], 1), roles, _means(parts, x), x.shape[2])


def _perm(parts: Sequence[Placed], x: Tensor) -> Tensor | None:
    if all(part.found.perm is None for part in parts):
        return None
    if len(parts) == 1:
        return parts[0].found.perm
    pieces = []
    for part in parts:
        own = part.found.perm
        if own is None:
            own = torch.arange(part.length, device=x.device)[None]
        pieces.append(own + part.start)
    return _side_by_side(pieces)


def _means(parts: Sequence[Placed], x: Tensor) -> Tensor | None:
    """Where one segment's means are known, those of the others (short ones: text, references) are made now."""
    if all(part.found.means is None for part in parts):
        return None
    pieces = []
    for part in parts:
        own = part.found.means
        if own is None:
            order = Order(part.found.perm, part.found.bounds, part.roles, tokens=part.length)
            own = order.mean(order.arrange(x[:, :, part.start : part.start + part.length]))
        pieces.append(own)
    return torch.cat(pieces, 1)


def _side_by_side(pieces: Sequence[Tensor]) -> Tensor:
    """Tensors [P1, ...] one behind the other; those that all planes share are repeated only where others are not."""
    planes = max(piece.shape[0] for piece in pieces)
    return torch.cat([piece.expand(planes, -1) for piece in pieces], 1)


class Identity(Blocked):
    """Tokens keep their order (SpargeAttn with q_block=128, MInference, NABLA, Sol-Attn and others)."""

    kind: ClassVar[str] = "identity"

    def start(self) -> LayoutState:
        return _Identity(self)


class _Identity(StaticState):
    def __init__(self, part: Identity) -> None:
        super().__init__()
        self.part = part

    def order(self, segment: Segment, side: str) -> Arrangement:
        return Arrangement(None, uniform(segment.length, self.part.size(side)))
