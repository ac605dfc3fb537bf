"""Sparse attention over a plan: one program per tile of queries.

Shapes: B batch, Hq query heads, Hk key heads, Sq, Sk tokens, D, Dv head dimensions, T tiles, R rows, C key blocks. See
`hasten.sparse_attn.plan` for the plan. A program reads its queries through `q_perm`, walks over the chunks of its row
and writes its outputs back through `q_perm`, so no permuted copy of q or o is ever made.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.kernels import config, launch
from hasten.sparse_attn.kernels.softmax import allowed, finish, fold, fold_full
from hasten.sparse_attn.kernels.tile import key_places, owner, piece, query_places
from hasten.sparse_attn.plan import Compensation, Output, Plan

MAX_DIM = 256
"""Largest head dimension: beyond it one chunk of keys and values does not fit into shared memory."""

_PLAIN = ["left", "right", "offset", "tree_keys", "keys", "queries", "q_perm_plane", "k_perm_plane", "blocks"]
"""Integers that change from call to call: specialising on them would only compile the same code again."""


@triton.jit(do_not_specialize=_PLAIN)
def _forward(
    q, k, v, k_view, v_view, o, lse, lse_exact, q_perm, k_perm,
    tile_start, tile_length, tile_plane, tile_row, row_start, row_full, row_end, chunk_start, chunk_length,
    centre, value, log_size, variance, approximate, tree,
    scale, left, right, offset, tree_keys, keys, queries, q_perm_plane, k_perm_plane, blocks,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    HQ: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TREE: tl.constexpr,
    ORDER: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scale: of the logits, times log2(e). PIECES programs share a tile; chunks of up to CHUNK keys are read in PARTS.
    ORDER of the compensation: 0 is none. k_view, v_view: descriptors of k and v for the copy engine (TMA), which then
    reads full chunks; or None."""
    tile, first, length = piece(tile_length, BLOCK_M, PIECES)
    if length <= 0:
        return
    plane, batch, head, key_head, key_plane = owner(tile, tile_plane, HQ, GROUPS)
    row = tl.load(tile_row + tile)

    on_m, on_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    on_d, on_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real_m, real_d, real_dv = on_m < length, on_d < D, on_dv < DV
    token = query_places(tile_start + tile, first + on_m, q_perm, plane * q_perm_plane, real_m, True)
    q_at = q + batch * q_b + head * q_h + token.to(tl.int64)[:, None] * q_s + on_d[None, :]
    x = tl.load(q_at, mask=real_m[:, None] & real_d[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)

    k_at = k + batch * k_b + key_head * k_h + on_d[:, None]
    v_at = v + batch * v_b + key_head * v_h + on_dv[None, :]
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    begin, middle, end = tl.load(row_start + row), tl.load(row_full + row), tl.load(row_end + row)
    if BLOCK_N * PARTS != CHUNK:  # a full chunk does not fill its tiles: ask about every length
        middle = begin

    for i in tl.range(begin * PARTS, middle * PARTS):
        start = tl.load(chunk_start + i // PARTS) + i % PARTS * BLOCK_N
        if k_view is not None:
            y = k_view.load([batch.to(tl.int32), key_head.to(tl.int32), start, 0]).reshape(BLOCK_N, BLOCK_D).T
            z = v_view.load([batch.to(tl.int32), key_head.to(tl.int32), start, 0]).reshape(BLOCK_N, BLOCK_DV)
        else:
            n = (start + on_n).to(tl.int64)
            y = _read(k_at + n[None, :] * k_s, real_d[:, None], BLOCK_D == D)
            z = _read(v_at + n[:, None] * v_s, real_dv[None, :], BLOCK_DV == DV)
        if UPCAST:
            y, z = y.to(tl.float32), z.to(tl.float32)
        s = tl.dot(x, y, input_precision=PRECISION)
        m, total, acc = fold_full(s, scale, z, m, total, acc, PRECISION)

    for i in tl.range(middle * PARTS, end * PARTS):
        real_n = on_n < tl.load(chunk_length + i // PARTS) - i % PARTS * BLOCK_N
        n = (tl.load(chunk_start + i // PARTS) + i % PARTS * BLOCK_N + on_n).to(tl.int64)
        y = tl.load(k_at + n[None, :] * k_s, mask=real_n[None, :] & real_d[:, None], other=0.0)
        z = tl.load(v_at + n[:, None] * v_s, mask=real_n[:, None] & real_dv[None, :], other=0.0)
        if UPCAST:
            y, z = y.to(tl.float32), z.to(tl.float32)
        s = tl.dot(x, y, input_precision=PRECISION) * scale
        read = real_n[None, :]
        if MASKED:
            k_pos = key_places(n, k_perm, key_plane * k_perm_plane, real_n)
            read = allowed(token, k_pos, left, right, offset, tree, tree_keys, keys, real_m, real_n, LEFT, RIGHT, TREE)
        s = tl.where(read, s, -float("inf"))
        m, total, acc = fold(s, z, m, total, acc, PRECISION)

    token = query_places(tile_start + tile, first + on_m, q_perm, plane * q_perm_plane, real_m, True)
    place = plane * queries + token
    if ORDER > 0:
        _, exact = finish(m, total)
        tl.store(lse_exact + place, exact, mask=real_m)
        m, total, acc = _stand_in(
            x, m, total, acc, centre, value, log_size, variance, approximate, key_plane, row, blocks, scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_C, ORDER, PRECISION, UPCAST,
        )  # fmt: skip
        token = query_places(tile_start + tile, first + on_m, q_perm, plane * q_perm_plane, real_m, True)
        place = plane * queries + token
    divisor, whole = finish(m, total)
    o_at = o + place[:, None] * DV + on_dv[None, :]
    tl.store(o_at, (acc / divisor[:, None]).to(o.dtype.element_ty), mask=real_m[:, None] & real_dv[None, :])
    tl.store(lse + place, whole, mask=real_m)


@triton.jit
def _read(at, real, WHOLE: tl.constexpr):
    """A tile of a full chunk; without any mask where the head dimension fills it."""
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=real, other=0.0)


@triton.jit
def _stand_in(
    x, m, total, acc, centre, value, log_size, variance, approximate, key_plane, row, blocks, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_C: tl.constexpr,
    ORDER: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the mean of every block that stands in for its tokens: logit s q.c + log n (+ s^2 q^2.var / 2).

    Means of other blocks are not even read: those of padding may hold anything.
    """
    on_c, on_d, on_dv = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real_d, real_dv = on_d < D, on_dv < DV
    if ORDER == 2:
        half = x.to(tl.float32) * (scale * 0.6931471805599453)
        half = (half * half * 0.5).to(variance.dtype.element_ty)
    for c in tl.range(0, blocks, BLOCK_C):
        block = c + on_c
        stands = tl.load(approximate + row.to(tl.int64) * blocks + block, mask=block < blocks, other=0) != 0
        at = key_plane * blocks + block
        y = tl.load(centre + at[None, :] * D + on_d[:, None], mask=stands[None, :] & real_d[:, None], other=0.0)
        z = tl.load(value + at[:, None] * DV + on_dv[None, :], mask=stands[:, None] & real_dv[None, :], other=0.0)
        size = tl.load(log_size + at, mask=stands, other=-float("inf"))
        if UPCAST:
            y, z = y.to(tl.float32), z.to(tl.float32)
        s = tl.dot(x, y, input_precision=PRECISION) * scale
        if ORDER == 2:
            spread_at = variance + at[None, :] * D + on_d[:, None]
            spread = tl.load(spread_at, mask=stands[None, :] & real_d[:, None], other=0.0)
            s += tl.dot(half, spread, input_precision="ieee") * 1.4426950408889634
        s = s + size[None, :] * 1.4426950408889634
        m, total, acc = fold(s, z, m, total, acc, PRECISION)
    return m, total, acc


KERNEL = _forward
"""What runs; `launch.interpreted` tells whether that is Triton's interpreter."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, compensation: Compensation | None = None
) -> Output:
    """Attention of q [B, Hq, Sq, D] over what `plan` reads of k [B, Hk, Sk, D] and v [B, Hk, Sk, Dv].

    q is in original order and so is the output; k and v are arranged already (`Order.arrange`). One dtype: float16,
    bfloat16 or float32; sums are kept in float32. D and Dv up to 256. Queries that stand in no tile come back as having
    read nothing. Raises `UsageError` for tensors or plans that no kernel can read.
    """
    dtype = launch.same_dtype(q=q, k=k, v=v)
    launch.check(_forward, q=q, k=k, v=v, tile_start=plan.tile_start)
    check_shapes(q, k, v, plan)
    upcast = launch.interpreted(_forward) and dtype == torch.bfloat16
    output, job = prepare(q, k, v, plan, scale, compensation, launch.arch(q), upcast=upcast)
    job.run(q)
    return Output(output.o.to(dtype), output.lse, output.lse_exact) if upcast else output


def prepare(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, compensation: Compensation | None, arch: int,
    *, upcast: bool = False,
) -> tuple[Output, launch.Launch]:  # fmt: skip
    """The launch of `forward` on a GPU of capability `arch`, and the output that it fills.

    upcast: compute in float32 (Triton's interpreter gets products of bfloat16 wrong).
    """
    q, k, v = launch.rows(q), launch.rows(k), launch.rows(v)
    if scale < 0:
        q, scale = -q, -scale
    (b, hq, sq, d), (hk, dv) = q.shape, (k.shape[1], v.shape[3])
    order = 0 if compensation is None else 1 if compensation.variances is None else 2
    tree = plan.mask is not None and plan.mask.tree is not None
    chosen = config.forward_config(arch, d, dv, q.dtype, plan.block_m, plan.block_n, order=order, tree=tree)
    pieces = -(-plan.block_m // chosen.block_m)
    o = torch.zeros(b, hq, sq, dv, device=q.device, dtype=torch.float32 if upcast else q.dtype)
    lse = torch.full((b, hq, sq), -torch.inf, device=q.device)
    lse_exact = torch.full_like(lse, -torch.inf) if order else None
    arguments = (
        {"q": q, "k": k, "v": v, "o": o, "lse": lse, "lse_exact": lse_exact}
        | (_views(k, v, chosen.block_n) if chosen.tma else {"k_view": None, "v_view": None})
        | {"scale": scale * launch.LOG2E, "queries": sq}
        | launch.plan_arguments(plan)
        | launch.mask_arguments(plan.mask)
        | _tables(compensation, q.dtype)
        | launch.strides(q=q, k=k, v=v)
        | {"HQ": hq, "GROUPS": hq // hk, "D": d, "DV": dv, "BLOCK_D": launch.power(d), "BLOCK_DV": launch.power(dv)}
        | {"BLOCK_M": chosen.block_m, "PIECES": pieces, "BLOCK_C": chosen.block_c}
        | {"BLOCK_N": chosen.block_n, "CHUNK": plan.block_n, "PARTS": config.chunk(plan.block_n) // chosen.block_n}
        | {"ORDER": order, "PRECISION": launch.precision(q.dtype), "UPCAST": upcast}
    )
    grid = (plan.tile_start.numel() * pieces,)
    return Output(o, lse, lse_exact), launch.Launch(_forward, grid, arguments, chosen.warps, chosen.stages)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    """Refuse tensors that the plan was not made for. Raises `UsageError` with both sides."""
    b, hq, hk = plan.heads
    wanted = {"q": (b, hq, plan.queries), "k": (b, hk, plan.keys), "v": (b, hk, plan.keys)}
    for (name, shape), x in zip(wanted.items(), (q, k, v), strict=True):
        if tuple(x.shape[:3]) != shape:
            raise UsageError(
                f"{name} has (batch, heads, tokens) = {tuple(x.shape[:3])}, the plan was made for {shape}."
                " Make a plan for these tensors."
            )
    if q.shape[3] != k.shape[3]:
        raise UsageError(f"q has head dimension {q.shape[3]} and k {k.shape[3]}; they have to be the same.")
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[3] <= MAX_DIM:
            raise UsageError(f"{name} has head dimension {x.shape[3]}; kernels take 1 to {MAX_DIM}; torch takes any.")


def _views(k: Tensor, v: Tensor, block_n: int) -> dict[str, Any]:
    """What the copy engine needs to read chunks of k and v; None where it cannot, since it wants steps of 16 bytes."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # newer than the rest: Triton 3.4

    size = k.element_size()
    steps = [step * size for step in (*k.stride()[:3], *v.stride()[:3])]
    if any(step % 16 for step in (*steps, k.data_ptr(), v.data_ptr())):
        return {"k_view": None, "v_view": None}
    return {
        f"{name}_view": TensorDescriptor(x, [*x.shape], [*x.stride()], [1, 1, block_n, launch.power(x.shape[3])])
        for name, x in (("k", k), ("v", v))
    }


def _tables(compensation: Compensation | None, dtype: torch.dtype) -> dict[str, Any]:
    """The tables of a compensation: means in the dtype of the keys, and which blocks stand in as bytes.

    Variances go as float16, which is exact enough for what is added to logits; bfloat16 would cost 1 % of the
    second-order term. Those that do not fit are clamped.
    """
    if compensation is None:
        return dict.fromkeys(("centre", "value", "log_size", "variance", "approximate")) | {"blocks": 0}
    spread = compensation.variances
    if spread is not None and dtype != torch.float32:
        spread = spread.clamp(max=torch.finfo(torch.float16).max).half()
    return {
        "centre": compensation.keys.to(dtype).contiguous(),
        "value": compensation.values.to(dtype).contiguous(),
        "log_size": compensation.log_sizes.contiguous(),
        "variance": None if spread is None else spread.contiguous(),
        "approximate": compensation.approximate.contiguous().view(torch.uint8),
        "blocks": compensation.keys.shape[1],
    }
