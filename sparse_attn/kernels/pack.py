"""From the map of chosen blocks to lists of chunks, one program per row, without waiting for the host.

Shapes: P1 planes with rows of their own (1 where all share them), Cq, Ck blocks, R = P1 * Cq rows. The torch version is
`hasten.sparse_attn.pack_chunks.bounded`; the two give the same chunks, place by place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.kernels import launch
from hasten.sparse_attn.pack_chunks import Chunks, room

MOST_BLOCKS = 2**11
"""Key blocks that one program can hold. Maps with more are for the torch version."""


@triton.jit
def _chosen(chosen, bounds, block, count):
    """Which blocks belong to a run: chosen ones, and ones without tokens, which do not part their neighbours."""
    there = (block >= 0) & (block < count)
    begin = tl.load(bounds + block, mask=there, other=0)
    end = tl.load(bounds + block + 1, mask=there, other=1)
    return there & ((tl.load(chosen + block, mask=there, other=0) != 0) | (begin == end))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _runs(chosen, bounds, block, count):
    """First token and number of tokens of each run, given at its last block; elsewhere the number is 0."""
    inside = _chosen(chosen, bounds, block, count)
    begins = inside & ~_chosen(chosen, bounds, block - 1, count)
    ends = inside & ~_chosen(chosen, bounds, block + 1, count)
    # Bounds never fall, so the latest begin is the largest one so far.
    here = tl.load(bounds + block, mask=block < count, other=0)
    first = tl.associative_scan(tl.where(begins, here, -1), 0, _larger)
    end = tl.load(bounds + block + 1, mask=block < count, other=0)
    return first, tl.where(ends, end - first, 0)


@triton.jit
def _cut(start, length, at, first, size, pieces, CHUNK: tl.constexpr):
    """Writes `pieces` chunks of each range to consecutive places; returns how many those were."""
    own = at + tl.cumsum(pieces, 0) - pieces
    for j in tl.range(0, tl.max(pieces, 0)):
        tl.store(start + own + j, first + j * CHUNK, mask=j < pieces)
        tl.store(length + own + j, tl.minimum(size - j * CHUNK, CHUNK), mask=j < pieces)
    return tl.sum(pieces, 0)


@triton.jit(do_not_specialize=["count", "q_blocks", "each", "bounds_plane"])
def _fill(
    whole, split, bounds, start, length, row_full, row_end, count, q_blocks, each, bounds_plane,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Full chunks of whole runs, then what they leave behind, then the chunks of runs that the mask splits."""
    row = tl.program_id(0)
    at = row * each
    bounds += row // q_blocks * bounds_plane
    block = tl.arange(0, BLOCK)
    first, size = _runs(whole + row.to(tl.int64) * count, bounds, block, count)
    full = size // CHUNK
    at += _cut(start, length, at, first, size, full, CHUNK)
    tl.store(row_full + row, at)
    at += _cut(start, length, at, first + full * CHUNK, size % CHUNK, (size % CHUNK > 0).to(tl.int32), CHUNK)
    if split is not None:
        first, size = _runs(split + row.to(tl.int64) * count, bounds, block, count)
        at += _cut(start, length, at, first, size, (size + CHUNK - 1) // CHUNK, CHUNK)
    tl.store(row_end + row, at)


KERNEL = _fill


def fill(whole: Tensor, split: Tensor | None, bounds: Tensor, block_n: int, keys: int) -> Chunks:
    """Chunks of the keys in `whole` (blocks read entirely) and `split` (blocks about whose elements a mask is asked).

    whole, split: bool [P1, Cq, Ck], never both. bounds: int32 [1 or P1, Ck + 1]. keys: Sk. Chunks behind `row_end` have
    length 0. Raises `UsageError` for more than `MOST_BLOCKS` blocks and for tensors that are not on the kernel's
    device.
    """
    launch.check(_fill, whole=whole, split=split, bounds=bounds)
    if whole.shape[2] > MOST_BLOCKS:
        raise UsageError(
            f"{whole.shape[2]} key blocks; this kernel holds at most {MOST_BLOCKS}. Use larger blocks, or"
            " pack_chunks.bounded."
        )
    chunks, job = prepare(whole, split, bounds, block_n, keys)
    if whole.numel():
        job.run(whole)
    return chunks


def prepare(
    whole: Tensor, split: Tensor | None, bounds: Tensor, block_n: int, keys: int
) -> tuple[Chunks, launch.Launch]:
    """The launch of `fill`, and the chunks that it writes."""
    planes, q_blocks, count = whole.shape
    rows, each = planes * q_blocks, room(keys, count, block_n, split=split is not None)
    if rows * each >= 2**31:
        raise UsageError(f"{rows} rows of up to {each} chunks do not fit 32-bit indices; use larger blocks.")
    bounds = bounds.contiguous()
    start, length = (torch.zeros(rows * each, dtype=torch.int32, device=whole.device) for _ in range(2))
    row_start = torch.arange(rows, dtype=torch.int32, device=whole.device) * each
    row_full, row_end = row_start.clone(), row_start.clone()
    block = launch.power(count)
    arguments = {
        "whole": whole.contiguous().view(torch.uint8),
        "split": None if split is None else split.contiguous().view(torch.uint8),
        "bounds": bounds, "start": start, "length": length, "row_full": row_full, "row_end": row_end,
        "count": count, "q_blocks": q_blocks, "each": each, "BLOCK": block, "CHUNK": block_n,
        "bounds_plane": bounds.stride(0) if bounds.shape[0] > 1 else 0,
    }  # fmt: skip
    warps = max(1, block // 256)
    return Chunks(row_start, row_full, row_end, start, length), launch.Launch(_fill, (rows,), arguments, warps, 1)
