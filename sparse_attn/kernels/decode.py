"""Decoding with equal pieces of work, and merging of what parts of the keys gave.

Shapes: B batch, Hq, Hk heads, G = Hq / Hk, n new queries, S places of the cache, D, Dv head dimensions, R = B * Hk
rows, M = G * n queries of a row, W pieces. See `hasten.sparse_attn.text.decode` for the work and the twin of `decode`,
`hasten.sparse_attn.merge` for the twin of `merge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.kernels import config, launch
from hasten.sparse_attn.kernels.softmax import allowed, finish, fold
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.plan import Output

if TYPE_CHECKING:
    from hasten.sparse_attn.text.decode import Work

_PLAIN = ["left", "right", "offset", "tree_keys", "keys", "parts", "length"]


@triton.jit(do_not_specialize=_PLAIN)
def _decode(
    q, k, v, part, part_lse, wk_row, wk_lo, wk_hi, chunk_start, chunk_length, tree,
    scale, left, right, offset, tree_keys, keys,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    HK: tl.constexpr, GROUPS: tl.constexpr, NEW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TREE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One piece of a row for BLOCK_M of its queries; writes o and lse of the piece alone (0 and -inf where empty)."""
    piece = tl.program_id(0).to(tl.int64)
    row = tl.load(wk_row + piece)
    batch, key_head = (row // HK).to(tl.int64), (row % HK).to(tl.int64)
    on_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    on_n, on_d, on_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real_m, real_d, real_dv = on_m < GROUPS * NEW, on_d < D, on_dv < DV
    new = on_m % NEW
    head = key_head * GROUPS + on_m // NEW
    q_at = q + batch * q_b + head * q_h + new * q_s
    x = tl.load(q_at[:, None] + on_d[None, :], mask=real_m[:, None] & real_d[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    k_at = k + batch * k_b + key_head * k_h + on_d[:, None]
    v_at = v + batch * v_b + key_head * v_h + on_dv[None, :]
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in tl.range(tl.load(wk_lo + piece), tl.load(wk_hi + piece)):
        real_n = on_n < tl.load(chunk_length + i)
        place = tl.load(chunk_start + i) + on_n
        n = place.to(tl.int64)
        y = tl.load(k_at + n[None, :] * k_s, mask=real_n[None, :] & real_d[:, None], other=0.0)
        z = tl.load(v_at + n[:, None] * v_s, mask=real_n[:, None] & real_dv[None, :], other=0.0)
        if UPCAST:
            y, z = y.to(tl.float32), z.to(tl.float32)
        s = tl.dot(x, y, input_precision=PRECISION) * scale
        if MASKED:
            read = allowed(new, place, left, right, offset, tree, tree_keys, keys, real_m, real_n, LEFT, RIGHT, TREE)
            s = tl.where(read, s, -float("inf"))
        else:
            s = tl.where(real_n[None, :], s, -float("inf"))
        m, total, acc = fold(s, z, m, total, acc, PRECISION)
    divisor, lse = finish(m, total)
    at = piece * (GROUPS * NEW) + on_m
    tl.store(part + at[:, None] * DV + on_dv[None, :], acc / divisor[:, None], mask=real_m[:, None] & real_dv[None, :])
    tl.store(part_lse + at, lse, mask=real_m)


@triton.jit
def _add(m, total, acc, lse, o):
    """Adds a part's o [M, Dv] and lse [M] (natural logarithm) to the running softmax; parts of -inf add nothing."""
    power = lse * 1.4426950408889634
    top = tl.maximum(m, power)
    safe = tl.where(top == -float("inf"), 0.0, top)
    decay, weight = tl.exp2(m - safe), tl.exp2(power - safe)
    o = tl.where((weight > 0)[:, None], o.to(tl.float32), 0.0)
    return top, total * decay + weight, acc * decay[:, None] + o * weight[:, None]


@triton.jit
def _merge_pieces(
    part, part_lse, o, lse, rw_ptr,
    M: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """All pieces of one row, for BLOCK_M of its queries."""
    row = tl.program_id(0).to(tl.int64)
    on_m, on_dv = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    real_m = on_m < M
    real = real_m[:, None] & (on_dv < DV)[None, :]
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for piece in tl.range(tl.load(rw_ptr + row), tl.load(rw_ptr + row + 1)):
        at = (piece * M + on_m).to(tl.int64)
        one = tl.load(part_lse + at, mask=real_m, other=-float("inf"))
        values = tl.load(part + at[:, None] * DV + on_dv[None, :], mask=real, other=0.0)
        m, total, acc = _add(m, total, acc, one, values)
    divisor, whole = finish(m, total)
    at = row * M + on_m
    tl.store(o + at[:, None] * DV + on_dv[None, :], (acc / divisor[:, None]).to(o.dtype.element_ty), mask=real)
    tl.store(lse + at, whole, mask=real_m)


@triton.jit(do_not_specialize=_PLAIN)
def _merge(
    part, part_lse, o, lse, parts, length,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of `length` queries of `parts` parts, which stand one behind the other."""
    on_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    on_dv = tl.arange(0, BLOCK_DV)
    real_m = on_m < length
    real = real_m[:, None] & (on_dv < DV)[None, :]
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in tl.range(0, parts):
        at = i * length.to(tl.int64) + on_m
        one = tl.load(part_lse + at, mask=real_m, other=-float("inf"))
        values = tl.load(part + at[:, None] * DV + on_dv[None, :], mask=real, other=0.0)
        if UPCAST:
            values = values.to(tl.float32)
        m, total, acc = _add(m, total, acc, one, values)
    divisor, whole = finish(m, total)
    tl.store(o + on_m[:, None] * DV + on_dv[None, :], (acc / divisor[:, None]).to(o.dtype.element_ty), mask=real)
    tl.store(lse + on_m, whole, mask=real_m)


def decode(q: Tensor, k: Tensor, v: Tensor, work: Work, *, scale: float, mask: Mask | None = None) -> Output:
    """Attention of q [B, Hq, n, D] over the places of k [B or 1, Hk, S, D] and v that `work` names.

    The M queries that share a key head are rows of one tile: each key is read once for all of them. Pieces write
    partial results in float32, which a second launch merges. k and v with a batch of 1 are one pool for all samples.
    """
    dtype = launch.same_dtype(q=q, k=k, v=v)
    launch.check(_decode, q=q, k=k, v=v, wk_row=work.wk_row)
    upcast = launch.interpreted(_decode) and dtype == torch.bfloat16
    output, jobs = prepare(q, k, v, work, scale, mask, launch.arch(q), upcast=upcast)
    for job in jobs:
        job.run(q)
    return Output(output.o.to(dtype), output.lse)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, work: Work, scale: float, mask: Mask | None, arch: int, *, upcast: bool = False
) -> tuple[Output, tuple[launch.Launch, launch.Launch]]:
    """The two launches of `decode` on a GPU of capability `arch`, and the output that they fill."""
    q, k, v = launch.rows(q), launch.rows(k), launch.rows(v)
    (b, hq, new, d), (hk, dv) = q.shape, (k.shape[1], v.shape[3])
    rows, pieces = hq // hk * new, work.wk_row.numel()
    chosen = config.decode_config(arch, d, dv, q.dtype, rows, work.block)
    part = torch.empty(pieces, rows, dv, device=q.device, dtype=torch.float32)
    part_lse = torch.empty(pieces, rows, device=q.device)
    o = torch.empty(b, hq, new, dv, device=q.device, dtype=torch.float32 if upcast else q.dtype)
    lse = torch.empty(b, hq, new, device=q.device)
    # A batch of 1 is shared by all samples: its stride is 0, whatever the tensor says.
    shared = {f"{name}_b": 0 for name, x in (("k", k), ("v", v)) if x.shape[0] == 1}
    tensors = {
        "wk_row": work.wk_row, "wk_lo": work.wk_lo, "wk_hi": work.wk_hi,
        "chunk_start": work.chunk_start, "chunk_length": work.chunk_length,
    }  # fmt: skip
    first = (
        {"q": q, "k": k, "v": v, "part": part, "part_lse": part_lse, "scale": scale * launch.LOG2E, "keys": k.shape[2]}
        | tensors
        | launch.mask_arguments(mask)
        | launch.strides(q=q, k=k, v=v)
        | shared
        | {"HK": hk, "GROUPS": hq // hk, "NEW": new, "D": d, "DV": dv}
        | {"BLOCK_D": launch.power(d), "BLOCK_DV": launch.power(dv)}
        | {"BLOCK_M": chosen.block_m, "BLOCK_N": launch.power(work.block)}
        | {"PRECISION": launch.precision(q.dtype), "UPCAST": upcast}
    )
    second: dict[str, Any] = {"part": part, "part_lse": part_lse, "o": o, "lse": lse, "rw_ptr": work.rw_ptr}
    second |= {"M": rows, "DV": dv, "BLOCK_M": 16, "BLOCK_DV": launch.power(dv)}
    return Output(o, lse), (
        launch.Launch(_decode, (pieces, -(-rows // chosen.block_m)), first, chosen.warps, chosen.stages),
        launch.Launch(_merge_pieces, (b * hk, -(-rows // 16)), second, 4, 2),
    )


def merge(outputs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from o [..., Dv] and lse [...] over each: (o, lse).

    One launch for any number of parts; sums in float32, o in the dtype of the first part. Not differentiable; see
    `hasten.sparse_attn.merge.merge`, which is. Raises `UsageError` where shapes differ.
    """
    if not outputs:
        raise UsageError("merge() got no parts. Give it at least one (o, lse) pair.")
    launch.check(_merge, o=outputs[0][0], lse=outputs[0][1])
    shape = outputs[0][0].shape
    for number, (o, lse) in enumerate(outputs):
        if o.shape != shape or lse.shape != shape[:-1]:
            raise UsageError(
                f"merge(): part {number} has o {tuple(o.shape)} and lse {tuple(lse.shape)}; all parts have the o of"
                f" part 0, {tuple(shape)}, and lse has that shape without its last dimension."
            )
    dtype = outputs[0][0].dtype
    upcast = launch.interpreted(_merge) and dtype == torch.bfloat16
    o, lse, job = prepare_merge(outputs, upcast=upcast)
    job.run(o)
    return o.to(dtype), lse


def prepare_merge(
    outputs: Sequence[tuple[Tensor, Tensor]], *, upcast: bool = False
) -> tuple[Tensor, Tensor, launch.Launch]:
    """The launch of `merge`, and the o and lse that it fills."""
    shape, dtype = outputs[0][0].shape, outputs[0][0].dtype
    part = torch.stack([o.to(dtype) for o, _ in outputs])
    part_lse = torch.stack([lse.float() for _, lse in outputs])
    o = torch.empty(shape, device=part.device, dtype=torch.float32 if upcast else dtype)
    lse = torch.empty(shape[:-1], device=part.device)
    arguments = {"part": part, "part_lse": part_lse, "o": o, "lse": lse, "parts": len(outputs), "length": lse.numel()}
    arguments |= {"DV": shape[-1], "BLOCK_M": 32, "BLOCK_DV": launch.power(shape[-1]), "UPCAST": upcast}
    return o, lse, launch.Launch(_merge, (-(-lse.numel() // 32),), arguments, 4, 2)
