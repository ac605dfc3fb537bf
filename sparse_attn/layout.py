"""Layouts: in which order tokens stand, and where one block ends and the next begins."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.part import Part
from hasten.sparse_attn.blocks import ALWAYS, DENSE, NEVER, NONE, SELECT, SPARSE, Blocks, Order, uniform
from hasten.sparse_attn.segments import Segment, Tokens

EDGE = 64
"""Tokens per block of segments that no layout orders (text, references)."""


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


class LayoutState:
    """Orders one segment of one side; the base class puts the segments of a sequence together."""

    def arrange(self, x: Tensor, segment: Segment, side: str) -> Arrangement:
        """The order of x [B, H, n, D], the tokens of one segment. side: "q" or "k"."""
        raise NotImplementedError

    def blocks(self, q: Tensor, k: Tensor, q_tokens: Tokens, k_tokens: Tokens) -> Blocks:
        """Blocks of q [B, Hq, Sq, D] and k [B, Hk, Sk, D], whose segments are given."""
        return Blocks(self._order(q, q_tokens, "q"), self._order(k, k_tokens, "k"))

    def _order(self, x: Tensor, tokens: Tokens, side: str) -> Order:
        parts = [
            self._part(x[:, :, start : start + segment.length], segment, side)
            for start, segment in zip(tokens.starts, tokens.segments, strict=True)
            if segment.length
        ]
        starts = [start for start, segment in zip(tokens.starts, tokens.segments, strict=True) if segment.length]
        return join(parts, starts, x)

    def _part(self, x: Tensor, segment: Segment, side: str) -> tuple[Arrangement, Tensor]:
        ordered = segment.queries == "sparse" and segment.keys == "select" and segment.valid is None
        found = self.arrange(x, segment, side) if ordered else edge(segment, x)
        count = found.bounds.shape[1] - 1
        role = role_of(segment, side)
        roles = torch.full((count,), role, dtype=torch.int8, device=x.device)
        if side == "k" and found.always is not None:
            roles = torch.where(found.always, roles.new_tensor(ALWAYS), roles)
        if segment.valid is not None:
            roles[-1] = NONE if side == "q" else NEVER
        return found, roles


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


def join(parts: list[tuple[Arrangement, Tensor]], starts: list[int], x: Tensor) -> Order:
    """One `Order` of the arrangements of consecutive segments, which begin at `starts`."""
    b, h, s, _ = x.shape
    shared = all(part.bounds.shape[0] == 1 and (part.perm is None or part.perm.shape[0] == 1) for part, _ in parts)
    planes = 1 if shared else b * h
    bounds = [part.bounds[:, :-1].expand(planes, -1) + start for (part, _), start in zip(parts, starts, strict=True)]
    end = bounds[0].new_full((planes, 1), s)
    perm = None
    if any(part.perm is not None for part, _ in parts):
        pieces = []
        for (part, _), start in zip(parts, starts, strict=True):
            length = part.perm.shape[1] if part.perm is not None else 0
            own = part.perm if part.perm is not None else None
            if own is None:
                following = [other for other in (*starts, s) if other > start]
                length = following[0] - start
                own = torch.arange(length, device=x.device)[None]
            pieces.append(own.expand(planes, length) + start)
        perm = torch.cat(pieces, 1)
    means = None
    if len(parts) == 1 and parts[0][0].means is not None:
        means = parts[0][0].means
    return Order(perm, torch.cat([*bounds, end], 1).int(), torch.cat([roles for _, roles in parts]), means, s)


class Identity(Layout):
    """Tokens keep their order; blocks of `block` tokens (SpargeAttn, MInference, NABLA, Sol-Attn and others)."""

    kind = "identity"
    block: int = 64

    def start(self) -> LayoutState:
        return _Identity(self.block)


class _Identity(LayoutState):
    def __init__(self, block: int) -> None:
        self.block = block

    def arrange(self, x: Tensor, segment: Segment, side: str) -> Arrangement:
        return Arrangement(None, uniform(segment.length, self.block, x.device))
