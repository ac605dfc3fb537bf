"""Gradients of sparse attention over a plan: one program per tile of queries, everything in one pass.

Shapes: as in `kernels.forward`. For logits s, weights p = exp(s - lse) and outputs o, with g the gradient of o and h
that of the lse (FlashAttention, arXiv 2205.14135, appendix B.2, with the lse as a second output):

    delta = g.o - h      ds = p (g.v - delta)      dq = scale ds k      dk = scale ds q      dv = p g

A program adds its part of dk and dv to float32 buffers by atomic additions. The other way is a transposed plan (for
each run of keys the tiles that read it): chunks of clusters start anywhere, so most of them would lie in two runs and
be computed twice, its lists would have to be sorted anew for every plan, and p would be computed once more for dq. What
the atomics cost is that the order of additions, and so the last bits of dk and dv, differ from call to call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.errors import RefusedError
from hasten.sparse_attn.kernels import launch
from hasten.sparse_attn.kernels.forward import check_shapes
from hasten.sparse_attn.kernels.softmax import allowed
from hasten.sparse_attn.kernels.tile import key_places, owner, piece, query_places
from hasten.sparse_attn.plan import Compensation, Output, Plan

_PLAIN = ["left", "right", "offset", "tree_keys", "keys", "queries", "q_perm_plane", "k_perm_plane", "blocks"]


@triton.jit
def _gradients(x, g, y, z, s, lse, delta, scale, d_x, PRECISION: tl.constexpr):
    """One chunk: s [M, N] are logits times log2(e), -inf where nothing is read. Returns dq so far, dk and dv."""
    p = tl.exp2(s - lse[:, None])
    dz = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
    ds = p * (tl.dot(g, tl.trans(z), input_precision=PRECISION) - delta[:, None]) * scale
    ds = ds.to(x.dtype)
    d_x = tl.dot(ds, y, d_x, input_precision=PRECISION)
    return d_x, tl.dot(tl.trans(ds), x, input_precision=PRECISION), dz


@triton.jit(do_not_specialize=_PLAIN)
def _backward(
    q, k, v, d_o, lse, delta, d_q, d_k, d_v, q_perm, k_perm,
    tile_start, tile_length, tile_plane, tile_row, row_start, row_end, chunk_start, chunk_length,
    centre, value, log_size, approximate, d_centre, d_value, tree,
    scale, left, right, offset, tree_keys, keys, queries, q_perm_plane, k_perm_plane, blocks,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    HQ: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TREE: tl.constexpr,
    COMPENSATED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """PIECES programs share a tile, a chunk is read in SPLIT steps of BLOCK_N keys: what is added to d_k and d_v has to
    fit into registers. d_o, lse, delta, d_q are contiguous in original order, d_k and d_v arranged."""
    tile, first, length = piece(tile_length, BLOCK_M, PIECES)
    if length <= 0:
        return
    plane, batch, head, key_head, key_plane = owner(tile, tile_plane, HQ, GROUPS)
    row = tl.load(tile_row + tile)

    on_m, on_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    on_d, on_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real_m, real_d, real_dv = on_m < length, on_d < D, on_dv < DV
    token = query_places(tile_start + tile, first + on_m, q_perm, plane * q_perm_plane, real_m, False)
    at = plane * queries + token
    held_q, held_o = real_m[:, None] & real_d[None, :], real_m[:, None] & real_dv[None, :]
    q_at = q + batch * q_b + head * q_h + token.to(tl.int64)[:, None] * q_s + on_d[None, :]
    x = tl.load(q_at, mask=held_q, other=0.0)
    g = tl.load(d_o + at[:, None] * DV + on_dv[None, :], mask=held_o, other=0.0)
    if UPCAST:
        x, g = x.to(tl.float32), g.to(tl.float32)
    # A query that has read nothing (lse -inf) has no weights: exp2(s - inf) is 0 for all s.
    total = tl.load(lse + at, mask=real_m, other=float("inf")) * 1.4426950408889634
    total = tl.where(total == -float("inf"), float("inf"), total)
    shift = tl.load(delta + at, mask=real_m, other=0.0)
    d_x = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    log_scale = scale * 1.4426950408889634

    d_k += key_plane * keys * D
    d_v += key_plane * keys * DV
    for i in tl.range(tl.load(row_start + row) * SPLIT, tl.load(row_end + row) * SPLIT):
        within = i % SPLIT * BLOCK_N + on_n
        real_n = within < tl.load(chunk_length + i // SPLIT)
        place = tl.load(chunk_start + i // SPLIT) + within
        n = place.to(tl.int64)
        held_k, held_v = real_n[:, None] & real_d[None, :], real_n[:, None] & real_dv[None, :]
        k_at = k + batch * k_b + key_head * k_h + n[:, None] * k_s + on_d[None, :]
        v_at = v + batch * v_b + key_head * v_h + n[:, None] * v_s + on_dv[None, :]
        y, z = tl.load(k_at, mask=held_k, other=0.0), tl.load(v_at, mask=held_v, other=0.0)
        if UPCAST:
            y, z = y.to(tl.float32), z.to(tl.float32)
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION) * log_scale
        if MASKED:
            k_pos = key_places(n, k_perm, key_plane * k_perm_plane, real_n)
            read = allowed(token, k_pos, left, right, offset, tree, tree_keys, keys, real_m, real_n, LEFT, RIGHT, TREE)
            s = tl.where(read, s, -float("inf"))
        else:
            s = tl.where(real_n[None, :], s, -float("inf"))
        d_x, dy, dz = _gradients(x, g, y, z, s, total, shift, scale, d_x, PRECISION)
        tl.atomic_add(d_k + (place[:, None] * D + on_d[None, :]), dy, mask=held_k, sem="relaxed")
        tl.atomic_add(d_v + (place[:, None] * DV + on_dv[None, :]), dz, mask=held_v, sem="relaxed")

    if COMPENSATED:
        on_c = tl.arange(0, BLOCK_C)
        centre += key_plane * blocks * D
        value += key_plane * blocks * DV
        d_centre += key_plane * blocks * D
        d_value += key_plane * blocks * DV
        for c in tl.range(0, blocks, BLOCK_C):
            block = c + on_c
            stands = tl.load(approximate + row.to(tl.int64) * blocks + block, mask=block < blocks, other=0) != 0
            held_k, held_v = stands[:, None] & real_d[None, :], stands[:, None] & real_dv[None, :]
            size = tl.load(log_size + key_plane * blocks + block, mask=stands, other=-float("inf"))
            y_at, z_at = block[:, None] * D + on_d[None, :], block[:, None] * DV + on_dv[None, :]
            y, z = tl.load(centre + y_at, mask=held_k, other=0.0), tl.load(value + z_at, mask=held_v, other=0.0)
            if UPCAST:
                y, z = y.to(tl.float32), z.to(tl.float32)
            s = tl.dot(x, tl.trans(y), input_precision=PRECISION) * log_scale + size[None, :] * 1.4426950408889634
            d_x, dy, dz = _gradients(x, g, y, z, s, total, shift, scale, d_x, PRECISION)
            tl.atomic_add(d_centre + y_at, dy, mask=held_k, sem="relaxed")
            tl.atomic_add(d_value + z_at, dz, mask=held_v, sem="relaxed")

    tl.store(d_q + at[:, None] * D + on_d[None, :], d_x.to(d_q.dtype.element_ty), mask=held_q)


KERNEL = _backward

CONFIG = {
    16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1),
}  # fmt: skip
"""Padded head dimension -> (queries per program, keys per step, warps, stages), for inputs of 16 bits."""

CONFIG_32 = {16: (32, 16, 8, 1), 32: (32, 16, 8, 1), 64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}
"""The same for float32, whose products take several instructions and registers each."""

ROW = 8
"""Numbers of 16 bits in what is copied at once. Rows of another length are read element by element, and chunks not ahead of
time: more of them in flight gain nothing, and their addresses took the last registers of sm_90 at head dimension 66."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """q: [B, Hq, Sq, D] in the dtype of q; k, v: arranged, in the dtype of k and v. keys, values: float32 [Pk, C, D or
    Dv], of the compensation's tables; None without one."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


def backward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, compensation: Compensation | None,
    output: Output, d_o: Tensor, d_lse: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients for d_o [B, Hq, Sq, Dv] and d_lse [B, Hq, Sq] (None: 0) of what `kernels.forward.forward` returned.

    Arguments as there; sizes of blocks (`Compensation.log_sizes`) are constants. Raises `UsageError` for tensors that
    no kernel can read and `RefusedError` for compensation of the second order, which only the torch version
    differentiates.
    """
    dtype = launch.same_dtype(q=q, k=k, v=v)
    launch.check(_backward, q=q, k=k, v=v, d_o=d_o, tile_start=plan.tile_start)
    check_shapes(q, k, v, plan)
    if max(plan.keys, plan.queries) * max(q.shape[3], v.shape[3]) >= 2**31:
        raise RefusedError(
            f"{max(plan.keys, plan.queries)} tokens of one head do not fit the 32-bit places of the Triton backward."
            ' Use backend="torch".'
        )
    if compensation is not None and compensation.variances is not None:
        raise RefusedError(
            "The Triton backward has no gradient through the variances of second-order compensation."
            ' Use order=1, or backend="torch".'
        )
    upcast = launch.interpreted(_backward) and dtype == torch.bfloat16
    found, job = prepare(q, k, v, plan, scale, compensation, output, d_o, d_lse, upcast=upcast)
    job.run(q)
    return Gradients(found.q.to(dtype), found.k.to(dtype), found.v.to(dtype), found.keys, found.values)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, compensation: Compensation | None,
    output: Output, d_o: Tensor, d_lse: Tensor | None, *, upcast: bool = False,
) -> tuple[Gradients, launch.Launch]:  # fmt: skip
    """The launch of `backward`, and the gradients that it fills; those of k and v are float32."""
    q, k, v, d_o = launch.rows(q), launch.rows(k), launch.rows(v), d_o.to(q.dtype).contiguous()
    (hq, d), (hk, dv) = (q.shape[1], q.shape[3]), (k.shape[1], v.shape[3])
    block_d = launch.power(max(d, dv))
    precision = launch.precision(q.dtype)
    if precision == "tf32x3" and block_d > 128:
        precision = "ieee"  # three TF32 products of this width do not fit into registers
    block_m, block_n, warps, stages = (CONFIG_32 if q.dtype == torch.float32 else CONFIG)[block_d]
    if d % ROW or dv % ROW:
        stages = 1
    block_m, block_n = min(block_m, launch.power(plan.block_m)), min(block_n, launch.power(plan.block_n))
    pieces = -(-plan.block_m // block_m)
    delta = (d_o.float() * output.o.float()).sum(-1)
    tables = _tables(compensation, q.dtype)
    summed = [k, v] if compensation is None else [k, v, compensation.keys, compensation.values]
    found = Gradients(
        torch.zeros(q.shape, dtype=torch.float32 if upcast else q.dtype, device=q.device),
        *(torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in summed),
    )
    arguments = (
        {"q": q, "k": k, "v": v, "d_o": d_o, "lse": output.lse.contiguous(), "scale": scale, "queries": plan.queries}
        | {"delta": delta if d_lse is None else delta - d_lse.float()}
        | {"d_q": found.q, "d_k": found.k, "d_v": found.v, "d_centre": found.keys, "d_value": found.values}
        | {name: x for name, x in launch.plan_arguments(plan).items() if name != "row_full"}
        | launch.mask_arguments(plan.mask)
        | tables
        | launch.strides(q=q, k=k, v=v)
        | {"HQ": hq, "GROUPS": hq // hk, "D": d, "DV": dv, "BLOCK_D": launch.power(d), "BLOCK_DV": launch.power(dv)}
        | {"BLOCK_M": block_m, "PIECES": pieces, "BLOCK_N": block_n, "SPLIT": -(-plan.block_n // block_n)}
        | {"BLOCK_C": min(32, block_n)}
        | {"COMPENSATED": compensation is not None, "PRECISION": precision, "UPCAST": upcast}
    )
    grid = (plan.tile_start.numel() * pieces,)
    return found, launch.Launch(_backward, grid, arguments, warps, stages)


def _tables(compensation: Compensation | None, dtype: torch.dtype) -> dict[str, Tensor | int | None]:
    """What `kernels.forward` reads of a compensation of the first order, by the names that kernels give it."""
    if compensation is None:
        return {"centre": None, "value": None, "log_size": None, "approximate": None, "blocks": 0}
    return {
        "centre": compensation.keys.to(dtype).contiguous(),
        "value": compensation.values.to(dtype).contiguous(),
        "log_size": compensation.log_sizes.contiguous(),
        "approximate": compensation.approximate.contiguous().view(torch.uint8),
        "blocks": compensation.keys.shape[1],
    }
