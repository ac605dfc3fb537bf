"""How much attention each key receives: column sums of the softmax, over what a plan reads.

Shapes: see `hasten.sparse_attn.kernels.forward`. One program per tile of queries, as in the forward; sums of tiles meet
in float32 atomic additions, so their last bits differ from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.sparse_attn.kernels import config, launch
from hasten.sparse_attn.kernels.forward import check_shapes
from hasten.sparse_attn.kernels.softmax import allowed
from hasten.sparse_attn.kernels.tile import key_places, owner, piece, query_places
from hasten.sparse_attn.plan import Plan

_PLAIN = ["left", "right", "offset", "tree_keys", "keys", "queries", "q_perm_plane", "k_perm_plane"]


@triton.jit(do_not_specialize=_PLAIN)
def _columns(
    q, k, lse, sums, q_perm, k_perm,
    tile_start, tile_length, tile_plane, tile_row, row_start, row_full, row_end, chunk_start, chunk_length, tree,
    scale, left, right, offset, tree_keys, keys, queries, q_perm_plane, k_perm_plane,
    q_b, q_h, q_s, k_b, k_h, k_s,
    HQ: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TREE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the columns of one tile; those of the query heads of a group go together."""
    tile, first, length = piece(tile_length, BLOCK_M, PIECES)
    if length <= 0:
        return
    plane, batch, head, key_head, key_plane = owner(tile, tile_plane, HQ, GROUPS)
    row = tl.load(tile_row + tile)
    on_m, on_n, on_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    real_m, real_d = on_m < length, on_d < D
    token = query_places(tile_start + tile, first + on_m, q_perm, plane * q_perm_plane, real_m, False)
    q_at = q + batch * q_b + head * q_h + token.to(tl.int64)[:, None] * q_s + on_d[None, :]
    x = tl.load(q_at, mask=real_m[:, None] & real_d[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    log_whole = tl.load(lse + plane * queries + token, mask=real_m, other=-float("inf")) * 1.4426950408889634
    real_m = real_m & (log_whole > -float("inf"))
    k_at = k + batch * k_b + key_head * k_h + on_d[:, None]
    out = sums + key_plane * keys

    begin, middle, end = tl.load(row_start + row), tl.load(row_full + row), tl.load(row_end + row)
    for i in tl.range(begin * PARTS, end * PARTS):
        real_n = on_n < tl.load(chunk_length + i // PARTS) - i % PARTS * BLOCK_N
        n = (tl.load(chunk_start + i // PARTS) + i % PARTS * BLOCK_N + on_n).to(tl.int64)
        y = tl.load(k_at + n[None, :] * k_s, mask=real_n[None, :] & real_d[:, None], other=0.0)
        if UPCAST:
            y = y.to(tl.float32)
        s = tl.dot(x, y, input_precision=PRECISION) * scale
        k_pos = key_places(n, k_perm, key_plane * k_perm_plane, real_n)
        read = real_m[:, None] & real_n[None, :]
        if MASKED:  # noqa: SIM102  (decided when compiling; the next one on the device)
            if i >= middle * PARTS:
                read = allowed(
                    token, k_pos, left, right, offset, tree, tree_keys, keys, real_m, real_n, LEFT, RIGHT, TREE
                )
        p = tl.where(read, tl.exp2(s - log_whole[:, None]), 0.0)
        tl.atomic_add(out + k_pos, tl.sum(p, 0), mask=real_n, sem="relaxed")


def column_sums(q: Tensor, k: Tensor, lse: Tensor, plan: Plan, scale: float) -> Tensor:
    """Sum over the queries of exp(logit - lse), for the keys that the plan reads: float32 [B, Hk, Sk], original order.

    q [B, Hq, Sq, D] and lse [B, Hq, Sq] are in original order, k [B, Hk, Sk, D] is arranged. With the lse of dense
    attention these are the true column masses of what is read; with that of the plan's own output they add up to the
    number of queries that read something. Queries whose lse is -inf count nothing.
    """
    dtype = launch.same_dtype(q=q, k=k)
    launch.check(_columns, q=q, k=k, lse=lse, tile_start=plan.tile_start)
    check_shapes(q, k, k, plan)
    upcast = launch.interpreted(_columns) and dtype == torch.bfloat16
    sums, job = prepare(q, k, lse, plan, scale, launch.arch(q), upcast=upcast)
    job.run(q)
    return sums


def prepare(
    q: Tensor, k: Tensor, lse: Tensor, plan: Plan, scale: float, arch: int, *, upcast: bool = False
) -> tuple[Tensor, launch.Launch]:
    """The launch of `column_sums` on a GPU of capability `arch`, and the sums that it adds to."""
    q, k = launch.rows(q), launch.rows(k)
    b, hq, sq, d = q.shape
    hk = k.shape[1]
    tree = plan.mask is not None and plan.mask.tree is not None
    chosen = config.forward_config(arch, d, d, q.dtype, plan.block_m, plan.block_n, tree=tree)
    pieces = -(-plan.block_m // chosen.block_m)
    sums = torch.zeros(b, hk, plan.keys, device=q.device)
    arguments = (
        {"q": q, "k": k, "lse": lse.float().contiguous(), "sums": sums, "scale": scale * launch.LOG2E, "queries": sq}
        | launch.plan_arguments(plan)
        | launch.mask_arguments(plan.mask)
        | launch.strides(q=q, k=k)
        | {"HQ": hq, "GROUPS": hq // hk, "D": d, "BLOCK_D": launch.power(d)}
        | {"BLOCK_M": chosen.block_m, "PIECES": pieces}
        | {"BLOCK_N": chosen.block_n, "PARTS": config.chunk(plan.block_n) // chosen.block_n}
        | {"PRECISION": launch.precision(q.dtype), "UPCAST": upcast}
    )
    grid = (plan.tile_start.numel() * pieces,)
    return sums, launch.Launch(_columns, grid, arguments, chosen.warps, chosen.stages)
