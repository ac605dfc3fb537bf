"""Token order and blocks of both sides of attention: what layouts produce and scorers, selectors and the packer read.

Shapes: B batch, H heads, P planes = B * H (Pq of queries, Pk of keys), P1 either 1 (shared by all planes) or P,
S tokens, C blocks, D head dimension. "Arranged" means in the order of the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.sparse_attn.sums import block_sums

SPARSE, DENSE, NONE = 0, 1, 2
"""Roles of query blocks: read what is selected; read all but padding; read nothing."""
SELECT, ALWAYS, NEVER = 0, 1, 2
"""Roles of key blocks: read where selected; read by all; read by nobody."""


@dataclass(frozen=True, slots=True)
class Order:
    """One side of attention, cut into blocks.

    perm: int64 [P1, S], the token that stands at each arranged place; None where tokens keep their order.
    bounds: int32 [P1, C + 1], arranged place of each block's first token; the last is S. Blocks may be empty.
    roles: int8 [C]. means: float32 [P1, C, D] where the layout knows the mean of each block already (k-means).
    tokens: S, where the layout knows it: reading it from `bounds` would wait for the device.
    """

    perm: Tensor | None
    bounds: Tensor
    roles: Tensor
    means: Tensor | None = None
    tokens: int | None = None

    @property
    def count(self) -> int:
        """Blocks, C."""
        return self.roles.numel()

    @property
    def length(self) -> int:
        """Tokens, S: as the layout says, else from `perm`, else from the last bound (which waits for the device)."""
        if self.tokens is not None:
            return self.tokens
        return self.perm.shape[1] if self.perm is not None else int(self.bounds[0, -1])

    @property
    def sizes(self) -> Tensor:
        """Tokens of each block: int32 [P1, C]."""
        return self.bounds[:, 1:] - self.bounds[:, :-1]

    def arrange(self, x: Tensor) -> Tensor:
        """x [B, H, S, D] in the order of the blocks; x itself where tokens keep their order."""
        return arrange(x, self.perm)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `arrange`, for x [B, H, S, D] or [B, H, S]."""
        return restore(x, self.perm)

    def labels(self) -> Tensor:
        """The block that each arranged place belongs to: int64 [P1, S]."""
        places = torch.arange(self.length, device=self.bounds.device, dtype=self.bounds.dtype)
        inner = self.bounds[:, 1:-1].contiguous()
        return torch.searchsorted(inner, places.expand(inner.shape[0], -1).contiguous(), right=True)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of arranged x [B, H, S, D] over each block: float32 [B * H, C, D]; 0 for empty blocks."""
        return block_mean(x, self)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Both sides. Sq may differ from Sk, and Hq may be a multiple of Hk (grouped queries)."""

    q: Order
    k: Order

    def force(self, keep: Tensor) -> Tensor:
        """`keep` (bool [P, Cq, Ck]) after the roles: always-read keys and dense queries in, padding out."""
        q, k = self.q.roles[:, None], self.k.roles[None, :]
        forced = (k == ALWAYS) | (q == DENSE)
        return (keep | forced) & (k != NEVER) & (q != NONE)


def arrange(x: Tensor, perm: Tensor | None) -> Tensor:
    """x [B, H, S, D] with the tokens `perm` (int64 [1 or B * H, S]) at the places 0 to S - 1; x itself without one."""
    if perm is None:
        return x
    b, h, s, d = x.shape
    if perm.shape[0] == 1:
        return x.index_select(2, perm[0])
    return x.reshape(-1, d).index_select(0, _rows(perm)).view(b, h, s, d)


def restore(x: Tensor, perm: Tensor | None) -> Tensor:
    """The inverse of `arrange`, for x [B, H, S, D] or [B, H, S]."""
    if perm is None:
        return x
    if perm.shape[0] == 1:
        return torch.empty_like(x).index_copy_(2, perm[0], x)
    places = torch.arange(perm.shape[1], device=perm.device).expand_as(perm)
    inverse = torch.empty_like(perm).scatter_(1, perm, places)
    return x.reshape(perm.numel(), -1).index_select(0, _rows(inverse)).view(x.shape)


def _rows(perm: Tensor) -> Tensor:
    """perm [P, S] as rows of a [P * S, ...] tensor: whole rows are copied several times faster than by `gather`."""
    return (perm + torch.arange(perm.shape[0], device=perm.device)[:, None] * perm.shape[1]).flatten()


def block_mean(x: Tensor, order: Order) -> Tensor:
    """Mean of arranged x [B, H, S, D] over each block of `order`: float32 [B * H, C, D]; 0 for empty blocks."""
    return block_sums(x.flatten(0, 1), order.bounds) / order.sizes.clamp(min=1)[:, :, None]


def uniform(length: int, block: int, device: torch.device | None = None) -> Tensor:
    """Bounds of blocks of `block` tokens, the last one shorter: int32 [1, C + 1]."""
    count = -(-length // block)
    return (torch.arange(count + 1, device=device, dtype=torch.int32) * block).clamp_(max=length)[None]


def grouped(x: Tensor, groups: int) -> Tensor:
    """What belongs to key planes [P1, ...], for query planes: repeated for the query heads of each key head.

    groups: query heads per key head. A tensor shared by all planes (P1 = 1) stays as it is.
    """
    return x if groups == 1 or x.shape[0] == 1 else x.repeat_interleave(groups, 0)
