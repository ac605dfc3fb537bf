"""LSH: tokens sorted by a hash that vectors of one direction share."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.blocks import uniform
from hasten.sparse_attn.layouts.layout import Arrangement, Blocked, LayoutState
from hasten.sparse_attn.segments import Segment


class LSH(Blocked):
    """Sorted by angular hash, in equal blocks (HyperAttention, arXiv 2310.05869, algorithm 1 and definition 1).

    The hash of a token is the signs of its products with `projections` random directions; hashes stand in the order of a
    Gray code, in which neighbours differ in one sign. Queries and keys have the same directions, so that the i-th block
    of one side belongs to the i-th of the other where both are equally long. Tokens of one hash keep their order.

    seed: of the directions, which are the same for all heads (as in the official code), sites and devices. Unlike there,
    the last block may be shorter.
    """

    kind: ClassVar[str] = "lsh"
    block: int = Field(256, ge=1)
    projections: int = Field(7, ge=1, le=24)
    seed: int = 0

    def start(self) -> LayoutState:
        return _LSH(self)


class _LSH(LayoutState):
    def __init__(self, part: LSH) -> None:
        self.part = part
        self._directions: dict[tuple[int, torch.device], Tensor] = {}

    def arrange(self, x: Tensor, segment: Segment, side: str) -> Arrangement:
        b, h, n, d = x.shape
        rank = hashed(x.reshape(b * h, n, d), self._for(d, x.device))
        perm = rank.sort(stable=True, dim=-1).indices
        return Arrangement(perm, uniform(n, self.part.size(side), x.device))

    def _for(self, d: int, device: torch.device) -> Tensor:
        if (d, device) not in self._directions:
            generator = torch.Generator().manual_seed(self.part.seed)
            self._directions[d, device] = torch.randn(d, self.part.projections, generator=generator).to(device)
        return self._directions[d, device]

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._directions.values())


def hashed(x: Tensor, directions: Tensor) -> Tensor:
    """Place of each token's hash in the Gray code: int32 [P, n] for x [P, n, D] and directions [D, m]."""
    signs = torch.matmul(x.float(), directions) > 0
    bits = signs.cumsum(-1, dtype=torch.int32) % 2  # the number whose Gray code the signs are
    powers = 2 ** torch.arange(bits.shape[-1] - 1, -1, -1, device=x.device, dtype=torch.int32)
    return (bits * powers).sum(-1, dtype=torch.int32)
