"""Ranges of keys, cut into chunks, row by row: the part of packing that has to be fast.

Shapes: P1 planes with rows of their own, Cq, Ck blocks, R = P1 * Cq rows, N chunks. A row lists its full chunks first.
Two ways with the same result: `exact` asks how many chunks there are (free on a CPU); `bounded` gives each row the room
that it may need at most, and never waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hasten.sparse_attn.extent import FAR


class Chunks(NamedTuple):
    """See `hasten.sparse_attn.plan.Plan`: int32 [R] three times, int32 [N] twice."""

    row_start: Tensor
    row_full: Tensor
    row_end: Tensor
    start: Tensor
    length: Tensor


def exact(whole: Tensor, split: Tensor | None, bounds: Tensor, block_n: int) -> Chunks:
    """Chunks of the keys in `whole` (blocks read entirely) and `split` (blocks about whose elements a mask is asked).

    whole, split: bool [P1, Cq, Ck], never both. bounds: int32 [1 or P1, Ck + 1]. split None: there are none.
    """
    rows = whole.shape[0] * whole.shape[1]
    row, first, size = _ranges(whole, bounds)
    full_row, full_start = _cut(row, first, size // block_n, block_n)
    tail = size % block_n
    has = tail > 0
    ragged_row, ragged_start, ragged_length = row[has], (first + size - tail)[has], tail[has]
    if split is not None:
        row, first, size = _ranges(split, bounds)
        cut_row, cut_start = _cut(row, first, (size + block_n - 1) // block_n, block_n)
        end = (first + size).repeat_interleave((size + block_n - 1) // block_n)
        cut_length = (end - cut_start).clamp(max=block_n)
        ragged_row, order = torch.cat([ragged_row, cut_row]).sort(stable=True)
        ragged_start = torch.cat([ragged_start, cut_start])[order]
        ragged_length = torch.cat([ragged_length, cut_length])[order]
    return _joined(rows, full_row, full_start, ragged_row, ragged_start, ragged_length, block_n)


def _ranges(chosen: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of neighbouring chosen blocks: row, first key and number of keys of each, row by row: int64."""
    begin, finish = _edges(chosen, bounds)
    plane, block_q, block_k = begin.nonzero(as_tuple=True)
    last = finish.nonzero(as_tuple=True)[2]
    own = plane if bounds.shape[0] > 1 else torch.zeros_like(plane)
    first = bounds[own, block_k].long()
    return plane * chosen.shape[1] + block_q, first, bounds[own, last + 1].long() - first


def _edges(chosen: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """First and last blocks of runs; a block without tokens between two chosen ones does not part them."""
    chosen = chosen | (bounds[:, 1:] == bounds[:, :-1])[:, None, :]
    begin, finish = chosen.clone(), chosen.clone()
    begin[..., 1:] &= ~chosen[..., :-1]
    finish[..., :-1] &= ~chosen[..., 1:]
    return begin, finish


def _cut(row: Tensor, first: Tensor, pieces: Tensor, block_n: int) -> tuple[Tensor, Tensor]:
    """Row and first key of each of `pieces` consecutive chunks of a range."""
    before = (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
    number = torch.arange(before.numel(), device=row.device) - before
    return row.repeat_interleave(pieces), first.repeat_interleave(pieces) + number * block_n


def _joined(
    rows: int, full_row: Tensor, full_start: Tensor, ragged_row: Tensor, ragged_start: Tensor, ragged_length: Tensor,
    block_n: int,
) -> Chunks:  # fmt: skip
    """Full and ragged chunks, each sorted by row, in one list by row."""
    fulls, raggeds = torch.bincount(full_row, minlength=rows), torch.bincount(ragged_row, minlength=rows)
    end = (fulls + raggeds).cumsum(0)
    start = end - fulls - raggeds
    full_place = torch.arange(full_row.numel()) + (start - (fulls.cumsum(0) - fulls))[full_row]
    ragged_place = torch.arange(ragged_row.numel()) + (start + fulls - (raggeds.cumsum(0) - raggeds))[ragged_row]
    chunk_start = torch.empty(full_row.numel() + ragged_row.numel(), dtype=torch.int32)
    chunk_length = torch.full_like(chunk_start, block_n)
    chunk_start[full_place] = full_start.int()
    chunk_start[ragged_place] = ragged_start.int()
    chunk_length[ragged_place] = ragged_length.int()
    return Chunks(start.int(), (start + fulls).int(), end.int(), chunk_start, chunk_length)


def room(keys: int, count: int, block_n: int, *, split: bool) -> int:
    """Chunks that a row may need at most: whole ones, and one that is not for each run. count: key blocks.

    Runs of one kind have a gap between them; with both kinds they may touch.
    """
    return min(keys, keys // block_n + (count if split else (count + 1) // 2))


def bounded(whole: Tensor, split: Tensor | None, bounds: Tensor, block_n: int, keys: int) -> Chunks:
    """As `exact`, with `room` for each row; chunks behind `row_end` have length 0. keys: Sk."""
    planes, count_q, count_k = whole.shape
    each = room(keys, count_k, block_n, split=split is not None)
    first, size = _sizes(whole, bounds)
    lists = [(first, size // block_n), (first + size // block_n * block_n, (size % block_n > 0).int())]
    ends = [first + size, first + size]
    if split is not None:
        first, size = _sizes(split, bounds)
        lists.append((first, (size + block_n - 1) // block_n))
        ends.append(first + size)
    starts, pieces, ends_ = torch.cat([s for s, _ in lists], 1), torch.cat([n for _, n in lists], 1), torch.cat(ends, 1)
    upto = pieces.cumsum(1, dtype=torch.int32)
    slot = torch.arange(each, dtype=torch.int32, device=whole.device).expand(planes * count_q, -1).contiguous()
    at = torch.searchsorted(upto, slot, right=True).clamp(max=pieces.shape[1] - 1)
    start = starts.gather(1, at) + (slot - (upto - pieces).gather(1, at)) * block_n
    used = slot < upto[:, -1:]
    length = (ends_.gather(1, at) - start).clamp(max=block_n).masked_fill(~used, 0)
    row_start = torch.arange(planes * count_q, dtype=torch.int32, device=whole.device) * each
    return Chunks(
        row_start, row_start + upto[:, count_k - 1], row_start + upto[:, -1],
        start.masked_fill(~used, 0).reshape(-1), length.reshape(-1),
    )  # fmt: skip


def _sizes(chosen: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """First key and number of keys of the run that begins at each block, 0 where none does: int32 [R, Ck]."""
    begin, finish = _edges(chosen, bounds)
    first = bounds[:, None, :-1].expand(chosen.shape)
    end = bounds[:, None, 1:].expand(chosen.shape).masked_fill(~finish, FAR)
    end = end.flip(-1).cummin(-1).values.flip(-1)
    size = (end - first).masked_fill(~begin, 0)
    return first.reshape(-1, chosen.shape[2]), size.reshape(-1, chosen.shape[2])
