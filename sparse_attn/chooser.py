"""Choosers: which of several patterns a head uses.

Shapes: see `hasten.sparse_attn.blocks`; N patterns, M sampled queries.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.errors import RecipeError
from hasten.part import Part
from hasten.sparse_attn.blocks import Order, grouped
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.pattern import Selection


class Chooser(Part):
    """Base of the choosers. `start()` gives the state of one run, branch and attention site."""

    @abstractmethod
    def start(self) -> ChooserState:
        """Fresh state."""


class ChooserState:
    """Chooses for each call; those that choose once keep their choice."""

    def choose(
        self, q: Tensor, k: Tensor, v: Tensor, found: Sequence[Selection], scale: float, mask: Mask | None
    ) -> Tensor:
        """int64 [Pq], the number of each plane's pattern. q, k, v in original order; heads of a group choose alike."""
        raise NotImplementedError


class Sampled(Chooser):
    """The pattern whose output is nearest to dense attention on sampled queries (Sparse VideoGen, section 3.3).

    samples: queries, evenly spread over the sequence; the official code draws 64 from the first 10,000 rows only, which
    is the first frames of a video.
    """

    kind: ClassVar[str] = "sampled"
    samples: int = Field(default=64, ge=1)

    def start(self) -> ChooserState:
        return _Sampled(self.samples)


class _Sampled(ChooserState):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def choose(
        self, q: Tensor, k: Tensor, v: Tensor, found: Sequence[Selection], scale: float, mask: Mask | None
    ) -> Tensor:
        b, hq, sq, _ = q.shape
        groups = hq // k.shape[1]
        rows = torch.linspace(0, sq - 1, min(self.samples, sq), device=q.device).long()
        k, v = (x.float().repeat_interleave(groups, 1) for x in (k, v))
        scores = q[:, :, rows].float() @ k.mT * scale
        if mask is not None:
            allowed = mask.allowed(rows, torch.arange(k.shape[2], device=k.device), k.shape[2])
            scores = scores.masked_fill(~allowed, -math.inf)
        truth = scores.softmax(-1) @ v
        errors = []
        for selection in found:
            reads = _reads(selection, rows, groups, (b, hq))
            kept = scores.masked_fill(~reads, -math.inf).softmax(-1).nan_to_num(0.0) @ v
            errors.append((kept - truth).square().sum((-1, -2)).view(b, hq // groups, groups).sum(-1))
        choice = torch.stack(errors).argmin(0)
        return choice.repeat_interleave(groups, 1).reshape(-1)


class Fixed(Chooser):
    """Head h uses pattern heads[h] (found offline, as MInference does, or by design: mixed spans). Shorter tuples repeat."""

    kind: ClassVar[str] = "fixed"
    heads: tuple[int, ...]

    def start(self) -> ChooserState:
        return _Fixed(self.heads)


class _Fixed(ChooserState):
    def __init__(self, heads: tuple[int, ...]) -> None:
        self.heads = heads

    def choose(
        self, q: Tensor, k: Tensor, v: Tensor, found: Sequence[Selection], scale: float, mask: Mask | None
    ) -> Tensor:
        b, hq = q.shape[:2]
        groups = hq // k.shape[1]
        if max(self.heads) >= len(found) or min(self.heads) < 0:
            raise RecipeError(f"attention.chooser.heads names patterns 0 to {len(found) - 1}, got {self.heads}.")
        per_group = [self.heads[(head // groups) % len(self.heads)] for head in range(hq)]
        return torch.tensor(per_group, device=q.device).repeat(b)


def _reads(selection: Selection, rows: Tensor, groups: int, heads: tuple[int, int]) -> Tensor:
    """bool [B, Hq, M, Sk]: does the query (original position) read the key (original position)?"""
    b, hq = heads
    q_block = _block_of(selection.blocks.q)[:, rows]
    k_block = grouped(_block_of(selection.blocks.k), groups)
    planes = b * hq
    keep = selection.keep.expand(planes, -1, -1)
    chosen = keep.gather(1, q_block.expand(planes, -1)[..., None].expand(-1, -1, keep.shape[2]))
    reads = chosen.gather(2, k_block.expand(planes, -1)[:, None].expand(-1, rows.numel(), -1))
    return reads.view(b, hq, rows.numel(), -1)


def _block_of(order: Order) -> Tensor:
    """The block of each token, by original position: int64 [P1, S]."""
    labels = order.labels()
    if order.perm is None:
        return labels
    shape = (max(labels.shape[0], order.perm.shape[0]), labels.shape[1])
    return torch.empty(shape, dtype=torch.int64, device=labels.device).scatter_(
        1, order.perm.expand(shape), labels.expand(shape)
    )
