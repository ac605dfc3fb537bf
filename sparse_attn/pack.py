"""The packer: a map of chosen block pairs becomes a plan.

Shapes: see `hasten.sparse_attn.blocks` and `hasten.sparse_attn.plan`.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn import pack_chunks
from hasten.sparse_attn.backends.choice import installed
from hasten.sparse_attn.blocks import Blocks, Order, grouped
from hasten.sparse_attn.extent import FULL, PARTIAL, block_states
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.plan import Plan


def pack(
    blocks: Blocks, keep: Tensor, heads: tuple[int, int, int], *, block_m: int = 128, block_n: int = 64,
    mask: Mask | None = None, block_state: Tensor | None = None,
) -> Plan:  # fmt: skip
    """The plan that reads the pairs of blocks in `keep` (bool [1 or Pq, Cq, Ck], roles applied already).

    heads: (B, Hq, Hk). block_m: queries per tile, block_n: keys per chunk. block_state: `block_states(blocks, mask)`,
    where the caller has it already (a mask and a layout that stay).

    Rows are shared by all planes where `keep`, the bounds of the keys and, with a mask, the order of both sides are;
    else each plane has its own. Neighbouring blocks are read as one range. Pairs that the mask forbids are left out;
    the mask is asked about each element of those that it splits. The tiles with most chunks come first.

    On a CPU the plan has exactly the tiles and chunks it needs. Elsewhere it has room for the most that may be needed
    (unused tiles and chunks have length 0), for counting them would wait for the device.
    """
    groups = _check(blocks, keep, heads, block_m, block_n)
    whole, split = _chosen(blocks, keep, groups, mask, block_state)
    bounds = grouped(blocks.k.bounds, groups)
    if keep.device.type == "cpu":
        chunks = pack_chunks.exact(whole, split, bounds, block_n)
        start, length, index = _exact_tiles(blocks.q, heads[0] * heads[1], block_m)
    else:
        chunks = _on_device(whole, split, bounds, block_n, blocks.k.length)
        start, length, index = _bounded_tiles(blocks.q, heads[0] * heads[1], block_m, blocks.q.length)
    row = index if whole.shape[0] > 1 else index % blocks.q.count
    work = (chunks.row_end - chunks.row_start)[row.long()].masked_fill(length == 0, -1)
    order = work.argsort(descending=True, stable=True)
    plane = index // blocks.q.count
    return Plan(
        heads, blocks.q.length, blocks.k.length, block_m, block_n, blocks.q.perm, blocks.k.perm,
        start[order], length[order], plane[order], row[order],
        chunks.row_start, chunks.row_full, chunks.row_end, chunks.start, chunks.length, mask,
    )  # fmt: skip


def _check(blocks: Blocks, keep: Tensor, heads: tuple[int, int, int], block_m: int, block_n: int) -> int:
    """Query heads per key head; a `UsageError` where shapes do not agree."""
    b, hq, hk = heads
    if hk < 1 or hq % hk:
        raise UsageError(f"pack: {hq} query heads cannot share {hk} key heads; Hq has to be a multiple of Hk.")
    if keep.dtype != torch.bool or keep.dim() != 3 or keep.shape[1:] != (blocks.q.count, blocks.k.count):
        raise UsageError(
            f"pack: keep is {keep.dtype} {list(keep.shape)}; it has to be bool, [1 or {b * hq}, {blocks.q.count},"
            f" {blocks.k.count}]: planes, query blocks, key blocks."
        )
    for name, found, planes in (
        ("keep", keep.shape[0], b * hq),
        ("the bounds of the queries", blocks.q.bounds.shape[0], b * hq),
        ("the bounds of the keys", blocks.k.bounds.shape[0], b * hk),
    ):
        if found not in (1, planes):
            raise UsageError(f"pack: {name} have {found} planes; allowed are 1 (shared by all) and {planes}.")
    if block_m < 1 or block_n < 1:
        raise UsageError(f"pack: tiles of {block_m} queries and chunks of {block_n} keys; both have to be 1 or more.")
    return hq // hk


def _chosen(
    blocks: Blocks, keep: Tensor, groups: int, mask: Mask | None, block_state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Pairs read entirely and, with a mask, pairs of which some elements are: bool [P1, Cq, Ck]."""
    state = None if mask is None else block_states(blocks, mask, groups) if block_state is None else block_state
    there = (grouped(blocks.k.sizes, groups) > 0)[:, None, :]
    if blocks.q.bounds.shape[0] == 1 or max(keep.shape[0], there.shape[0]) > 1:
        there = there & (blocks.q.sizes > 0)[:, :, None]
    keep = keep & there
    if state is None:
        return keep, None
    return keep & (state == FULL), keep & (state == PARTIAL)


def _exact_tiles(order: Order, planes: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """First query, queries and block (plane * Cq + number) of each tile: int32 [T]."""
    sizes = order.sizes.expand(planes, -1).reshape(-1).long()
    pieces = (sizes + block_m - 1) // block_m
    index = torch.arange(pieces.numel()).repeat_interleave(pieces)
    number = torch.arange(index.numel()) - (pieces.cumsum(0) - pieces)[index]
    first = order.bounds[:, :-1].expand(planes, -1).reshape(-1)[index] + number * block_m
    length = (sizes[index] - number * block_m).clamp(max=block_m)
    return first.int(), length.int(), index.int()


def _bounded_tiles(order: Order, planes: int, block_m: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_exact_tiles`, with the most tiles that blocks of any sizes may need; those that are not have length 0."""
    pieces = (order.sizes + block_m - 1) // block_m
    upto = pieces.cumsum(1, dtype=torch.int32)
    most = min(queries, queries // block_m + order.count)
    slot = torch.arange(most, dtype=torch.int32, device=pieces.device).expand(pieces.shape[0], -1).contiguous()
    block = torch.searchsorted(upto, slot, right=True).clamp(max=order.count - 1)
    number = slot - (upto - pieces).gather(1, block)
    first = order.bounds[:, :-1].gather(1, block) + number * block_m
    length = (order.sizes.gather(1, block) - number * block_m).clamp(max=block_m).masked_fill(slot >= upto[:, -1:], 0)
    first = first.masked_fill(length == 0, 0)
    index = block + torch.arange(planes, device=pieces.device)[:, None] * order.count
    return tuple(x.expand(planes, -1).reshape(-1).int() for x in (first, length, index))  # type: ignore[return-value]


def _on_device(whole: Tensor, split: Tensor | None, bounds: Tensor, block_n: int, keys: int) -> pack_chunks.Chunks:
    """By the kernel where there is Triton and it can hold a row; else by the torch version, which is slower."""
    if whole.is_cuda and installed("triton"):
        kernel = import_module("hasten.sparse_attn.kernels.pack")
        if whole.shape[2] <= kernel.MOST_BLOCKS:
            return cast(pack_chunks.Chunks, kernel.fill(whole, split, bounds, block_n, keys))
    return pack_chunks.bounded(whole, split, bounds, block_n, keys)
