"""Decoding: a few new queries read chosen stretches of a long key/value cache, work spread evenly over the machine.

Shapes: B batch, Hq, Hk heads, G = Hq / Hk, n new queries, S places of the cache, D, Dv head dimensions, R = B * Hk rows
(one per sample and key head), M chunks a row may have, N = R * M, W pieces, C blocks of the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hasten.errors import RefusedError, UsageError
from hasten.sparse_attn.backends.choice import WIDEST, installed
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.merge import finite, merge_rows, normalise
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.text.decode_cpu import decode_cpu

Backend = Literal["auto", "torch", "triton"]

BLOCK = 64
"""Places of the cache per chunk."""


@dataclass(frozen=True, slots=True)
class Work:
    """Stream-K (LeanAttention, 2405.10480): all chunks of all rows in one line, cut into equal pieces.

    A piece that would reach over the end of a row is cut there, so that each belongs to one row. Rows of very different
    length (a ragged batch, heads with different budgets) thus cost what they hold; nothing waits for the longest one.

    chunk_start, chunk_length: int32 [N], places of the cache; the chunks of row r begin at r * M.
    wk_row, wk_lo, wk_hi: int32 [W], piece w reads chunks wk_lo to wk_hi (numbers in chunk_start) of row wk_row. Pieces
    may be empty. rw_ptr: int32 [R + 1], the pieces of row r are rw_ptr[r] to rw_ptr[r + 1]; rows may have none.
    block: longest chunk. most: no piece has more chunks.
    """

    wk_row: Tensor
    wk_lo: Tensor
    wk_hi: Tensor
    rw_ptr: Tensor
    chunk_start: Tensor
    chunk_length: Tensor
    block: int
    most: int

    @property
    def rows(self) -> int:
        """R."""
        return self.rw_ptr.numel() - 1

    def num_bytes(self) -> int:
        """Bytes of its index tensors."""
        tensors = (self.wk_row, self.wk_lo, self.wk_hi, self.rw_ptr, self.chunk_start, self.chunk_length)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def tokens(self) -> Tensor:
        """Places that are read, over all rows: int64 scalar on the device of the work."""
        rows, most = self.rows, self.chunk_start.numel() // max(1, self.rows)
        taken = torch.zeros(rows, dtype=torch.int64, device=self.wk_row.device)
        taken.index_add_(0, self.wk_row.long(), (self.wk_hi - self.wk_lo).long())
        inside = torch.arange(most, device=taken.device) < taken[:, None]
        return (self.chunk_length.view(rows, most) * inside).sum()


def workers(device: torch.device) -> int:
    """Pieces that keep a device busy: two per streaming multiprocessor of a GPU, one per thread of a CPU."""
    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)
    return torch.get_num_threads()


def split(chunk_start: Tensor, chunk_length: Tensor, count: Tensor, pieces: int, block: int = BLOCK) -> Work:
    """Work of chunk lists. chunk_start, chunk_length: int [R, M]; count: int [R], how many of them row r reads; pieces:
    workers (streaming multiprocessors, threads). Makes pieces + R - 1 pieces; reads nothing back from the device."""
    rows, most = chunk_start.shape
    if pieces < 1 or rows < 1:
        raise UsageError(f"Work is cut into 1 or more pieces of 1 or more rows, got {pieces} pieces of {rows} rows.")
    ends = count.long().cumsum(0)
    total = ends[-1]
    share = (total + pieces - 1) // pieces
    workers = (torch.arange(1, pieces, device=ends.device) * share).clamp(max=total)
    cuts = torch.cat([ends.new_zeros(1), workers, ends]).sort().values
    lo, hi = cuts[:-1], cuts[1:]
    row = torch.searchsorted(ends, lo, right=True).clamp(max=rows - 1)
    base = row * most - (ends - count)[row]  # from places in the line of all chunks to numbers in chunk_start
    numbers = torch.arange(rows + 1, device=ends.device)
    return Work(
        wk_row=row.int(),
        wk_lo=(lo + base).int(),
        wk_hi=(hi + base).int(),
        rw_ptr=torch.searchsorted(row, numbers).int(),
        chunk_start=chunk_start.int().reshape(-1),
        chunk_length=chunk_length.int().reshape(-1),
        block=block,
        most=max(1, min(most, -(-rows * most // pieces))),
    )


def select(keep: Tensor, bounds: Tensor, pieces: int, block: int = BLOCK, places: int | None = None) -> Work:
    """Work that reads the blocks that are kept, long ones in several chunks.

    keep: bool [R, C]. bounds: int [1 or R, C + 1], first place of each block. places: S, where known (it is read from
    the last bound otherwise); a row has at most S / block + C chunks.
    """
    rows, blocks = keep.shape
    places = int(bounds[:, -1].max()) if places is None else places
    room = max(1, min(places, places // block + blocks))
    bounds = bounds.long().expand(rows, -1)
    sizes = bounds[:, 1:] - bounds[:, :-1]
    ends = (((sizes + block - 1) // block) * keep).cumsum(1)
    number = torch.arange(room, device=keep.device).expand(rows, room).contiguous()
    owner = torch.searchsorted(ends, number, right=True).clamp(max=blocks - 1)
    first = torch.cat([ends.new_zeros(rows, 1), ends[:, :-1]], 1).gather(1, owner)
    start = bounds.gather(1, owner) + (number - first) * block
    length = (bounds.gather(1, owner + 1) - start).clamp(0, block)
    return split(start, length, ends[:, -1], pieces, block)


def whole(
    lengths: Tensor, heads: int, places: int, pieces: int, block: int = BLOCK, starts: Tensor | None = None
) -> Work:
    """Work that reads the whole cache: of sample b the places starts[b] (0) to lengths[b], for each of `heads` key
    heads. lengths, starts: int [B]. places: S."""
    first = torch.zeros_like(lengths) if starts is None else starts
    room = max(1, -(-places // block))
    start = first.long()[:, None] + torch.arange(room, device=lengths.device) * block
    length = (lengths.long()[:, None] - start).clamp(0, block)
    count = ((lengths - first).long().clamp(min=0) + block - 1) // block
    start, length, count = (x.repeat_interleave(heads, 0) for x in (start, length, count))
    return split(start, length, count, pieces, block)


def pages(table: Tensor, lengths: Tensor, heads: int, page: int, pieces: int) -> Work:
    """Work that reads a paged cache: table int [B, M], the page that holds places m * page and on of each sample, in a
    pool k [1, Hk, pages * page, D] that all samples share; lengths: int [B]."""
    start = table.long() * page
    length = (lengths.long()[:, None] - torch.arange(table.shape[1], device=table.device) * page).clamp(0, page)
    count = (lengths.long() + page - 1) // page
    start, length, count = (x.repeat_interleave(heads, 0) for x in (start, length, count))
    return split(start, length, count, pieces, page)


def decode(
    q: Tensor, k: Tensor, v: Tensor, work: Work, *,
    scale: float | None = None, mask: Mask | None = None, backend: Backend = "auto",
) -> Output:  # fmt: skip
    """Attention of q [B, Hq, n, D] over the places of k [B, Hk, S, D], v [B, Hk, S, Dv] that `work` names.

    The G * n queries that share a key head are one tile, so that each key is read once for all of them. A cache whose
    batch is 1 is a pool that all samples read (`pages`). mask: asked about (query, place) where it is given: causal
    among new queries, windows, the tree of a draft. Accumulates in float32; o comes back in the dtype of q.
    backend: "auto" takes Triton on CUDA where it can (see `refuses`), else torch. Without windows a CPU reads in place.
    """
    _check(q, k, v, work)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    reason = refuses(q, k, v) if backend == "triton" or q.is_cuda else None
    if backend == "triton" and reason is not None:
        raise RefusedError(f'backend="triton" cannot run this call: {reason} backend="auto" takes one that can.')
    if backend == "triton" or backend == "auto" and q.is_cuda and reason is None:
        from hasten.sparse_attn.kernels.decode import decode as kernel

        return kernel(q, k, v, work, scale=scale, mask=mask)
    tree_only = mask is None or (mask.left is None and mask.right is None)
    if q.device.type == "cpu" and tree_only and not _needs_grad(q, k, v) and q.dtype != torch.float64:
        return decode_cpu(q, k, v, work, scale, mask)
    return decode_torch(q, k, v, work, scale, mask)


def refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernel cannot run a call (on CUDA, "auto" then takes plain torch, slowly); None where it can."""
    if not installed("triton"):
        return "triton is not installed (pip install triton)."
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the kernel takes one of float16, bfloat16 and float32."
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"a head dimension is {max(q.shape[-1], v.shape[-1])}, the kernel takes up to {WIDEST}."
    return "gradients are asked for, which it does not have." if _needs_grad(q, k, v) else None


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def decode_torch(q: Tensor, k: Tensor, v: Tensor, work: Work, scale: float, mask: Mask | None) -> Output:
    """The twin of the kernel, for any device and differentiable: all pieces at once, each padded to the longest."""
    b, hq, n, d = q.shape
    hk, places = k.shape[1], k.shape[2]
    exact = torch.promote_types(q.dtype, torch.float32)
    rows = q.reshape(b * hk, hq // hk * n, d).to(exact)
    row = work.wk_row.long()
    place, real = _places(work, places)
    plane = row if k.shape[0] == b else row % hk
    flat = (place + plane[:, None] * places).reshape(-1)
    keys = k.reshape(-1, d).index_select(0, flat).view(*place.shape, d).to(exact)
    values = v.reshape(-1, v.shape[-1]).index_select(0, flat).view(*place.shape, v.shape[-1]).to(exact)
    logits = rows[row] @ keys.mT * scale
    allowed = real[:, None, :]
    if mask is not None:
        position = torch.arange(n, device=q.device).repeat(hq // hk).expand(len(row), -1)
        allowed = allowed & mask.allowed(position, place, places)
    logits = logits.masked_fill(~allowed, -math.inf)
    top = finite(logits.detach().amax(-1))
    weights = (logits - top[..., None]).exp()
    # What lies beyond a chunk's end may hold anything; a weight of 0 does not silence NaN.
    values = torch.where(real[..., None], values, torch.zeros_like(values))
    o, lse = normalise(weights @ values, weights.sum(-1), top, exact)
    o, lse = merge_rows(o, lse, row, b * hk)
    return Output(o.view(b, hq, n, -1).to(q.dtype), lse.view(b, hq, n).float())


def _places(work: Work, places: int) -> tuple[Tensor, Tensor]:
    """Places that each piece reads: int64 [W, L] and bool [W, L], which of them are real."""
    device = work.wk_row.device
    most = work.most if device.type != "cpu" else max(1, int((work.wk_hi - work.wk_lo).max()))
    number = work.wk_lo.long()[:, None] + torch.arange(most, device=device)
    inside = number < work.wk_hi[:, None]
    number = number.clamp(max=work.chunk_start.numel() - 1)
    within = torch.arange(work.block, device=device)
    place = work.chunk_start.long()[number][..., None] + within
    real = inside[..., None] & (within < work.chunk_length.long()[number][..., None])
    return place.clamp(0, places - 1).flatten(1), real.flatten(1)


def _check(q: Tensor, k: Tensor, v: Tensor, work: Work) -> None:
    b, hq, _, d = q.shape
    if k.shape[-1] != d or k.shape[:3] != v.shape[:3] or k.shape[0] not in (b, 1) or hq % k.shape[1]:
        raise UsageError(
            f"decode() got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; k and v agree in all but the"
            " last dimension, their batch is that of q (or 1: a pool of pages), their heads divide those of q."
        )
    if work.rows != b * k.shape[1]:
        raise UsageError(
            f"decode() got work of {work.rows} rows for {b} samples x {k.shape[1]} key heads = {b * k.shape[1]}."
            " Make the work for this batch."
        )
