"""Where the tokens of each block lie, and what a mask does to a pair of blocks.

Shapes: see `hasten.sparse_attn.blocks`; N properties of a token (position, frame, row, ...).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.sparse_attn.blocks import Blocks, Order, grouped
from hasten.sparse_attn.mask import Mask

FORBIDDEN, PARTIAL, FULL = 0, 1, 2
"""What a mask says of a pair of blocks: no element may be read, some may, all may."""

FAR = 2**29
"""Smallest value of a block without tokens; its largest is -FAR."""


def extents(order: Order, values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of `values` over the tokens of each block: int32 [P1, N, C] each.

    values: int32 [N, S], by original position. Blocks without tokens have (FAR, -FAR).
    """
    arranged = values[None] if order.perm is None else values[:, order.perm].transpose(0, 1)
    labels = order.labels()
    planes, count = max(arranged.shape[0], labels.shape[0]), values.shape[0]
    index = labels[:, None].expand(planes, count, -1)
    arranged = arranged.expand(planes, count, -1)
    low = arranged.new_full((planes, count, order.count), FAR).scatter_reduce_(2, index, arranged, "amin")
    high = arranged.new_full((planes, count, order.count), -FAR).scatter_reduce_(2, index, arranged, "amax")
    return low, high


def positions(order: Order) -> tuple[Tensor, Tensor]:
    """First and last original position of each block: int32 [P1, C] each. Blocks without tokens have (FAR, -FAR)."""
    if order.perm is not None:
        own = torch.arange(order.length, dtype=torch.int32, device=order.bounds.device)
        low, high = extents(order, own[None])
        return low[:, 0], high[:, 0]
    there = order.sizes > 0
    return order.bounds[:, :-1].masked_fill(~there, FAR), (order.bounds[:, 1:] - 1).masked_fill(~there, -FAR)


def block_states(blocks: Blocks, mask: Mask, groups: int = 1) -> Tensor:
    """FORBIDDEN, PARTIAL or FULL for each pair of blocks: int8 [P1, Cq, Ck]. Pairs with an empty block are FORBIDDEN.

    groups: query heads per key head. Exact for blocks of consecutive positions; for others, whose tokens need not fill
    the range they span, a pair may be PARTIAL that is not. Pairs that a draft tree touches are PARTIAL.
    """
    q_first, q_last = (x[:, :, None] for x in positions(blocks.q))
    k_first, k_last = (grouped(x, groups)[:, None, :] for x in positions(blocks.k))
    nearest, farthest = k_first - (q_last + mask.offset), k_last - (q_first + mask.offset)
    some = torch.ones_like(nearest, dtype=torch.bool)
    every = some.clone()
    if mask.left is not None:
        some &= farthest >= -mask.left
        every &= nearest >= -mask.left
    if mask.right is not None:
        some &= nearest <= mask.right
        every &= farthest <= mask.right
    if mask.tree is not None:
        touched = (k_last >= blocks.k.length - mask.tree.shape[1]).expand_as(some)
        some |= touched
        every &= ~touched
    there = (q_last >= q_first) & (k_last >= k_first)
    return ((some & there).to(torch.int8) + (some & every & there).to(torch.int8)).contiguous()
