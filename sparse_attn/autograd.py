"""Sparse attention that can be trained through: the plan is a constant, everything else has gradients.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D, Dv head dimensions, Pq = B * Hq planes of queries, Pk = B * Hk of keys,
C key blocks, R rows; T tiles of one slab, M queries of a tile, L keys of the longest row of a slab.

The torch version computes a slab of tiles at a time, and in the backward pass once more with gradients on: it is exact
by construction, keeps no weights in memory and is the twin that `kernels.backward` is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hasten.errors import RefusedError, UsageError
from hasten.sparse_attn.backends.choice import installed
from hasten.sparse_attn.plan import Compensation, Output, Plan

ROOM = 1 << 22
"""Weights of one slab at once: 16 MB in float32."""

Pair = tuple[Tensor, Tensor]


def planned_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None, *,
    compensation: Compensation | None = None, bias: Tensor | None = None, backend: str = "auto",
) -> Pair:  # fmt: skip
    """Attention of `plan`, differentiable: o [B, Hq, Sq, Dv] in the dtype of q, and its lse [B, Hq, Sq] in float32.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] in original order, of one dtype (float64 too, with an lse in
    float64). scale: of q.k, D ** -0.5 if None. bias: [B, Hk, Sk] in original order, added to the logits of each key (a
    dynamic mask), not to those of a compensation's blocks. Gradients reach q, k, v, bias and the keys, values and
    variances of `compensation`; so they reach k and v once more where those are means that were computed with gradients
    on. Once only: no second derivatives.

    backend: "auto" takes Triton on CUDA devices where it can, "torch" and "triton" insist. Triton's gradients of k and
    v are sums in no fixed order, so with `torch.use_deterministic_algorithms` "auto" takes torch (which reads the plan
    on the host). Raises `UsageError` for shapes that do not fit and `RefusedError` where "triton" cannot do it.
    """
    _check(q, k, v, plan, bias, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    refused = None if backend == "torch" else why_not_triton(q, v, compensation, bias)
    if backend == "triton" and refused is not None:
        raise RefusedError(f'backend="triton" cannot run this call: {refused} Use backend="torch".')
    k, v = arranged(k, plan.k_perm), arranged(v, plan.k_perm)
    bias = None if bias is None else arranged(bias, plan.k_perm)
    tables: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if compensation is not None:
        tables = (compensation.keys, compensation.values, compensation.variances)
    if backend == "triton" or (backend == "auto" and q.is_cuda and refused is None):
        keys, values, _ = tables
        if bias is not None:
            q, k = with_bias(q, k, bias, scale)
            keys = None if keys is None else F.pad(keys, (0, 2))
        found = _Kernels.apply(q, k, v, keys, values, plan, scale, compensation)  # type: ignore[no-untyped-call]
    else:
        found = _Slabs.apply(q, k, v, bias, *tables, plan, scale, compensation)  # type: ignore[no-untyped-call]
    return cast(Pair, found)


def why_not_triton(q: Tensor, v: Tensor, compensation: Compensation | None, bias: Tensor | None) -> str | None:
    """Why the kernels cannot run this call; None where they can."""
    if not installed("triton"):
        return "triton is not installed."
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"kernels take float16, bfloat16 and float32, and q is {q.dtype}."
    if max(q.shape[-1] + (2 if bias is not None else 0), v.shape[-1]) > 256:
        return "kernels take head dimensions up to 256, and a bias needs two coordinates of them."
    if compensation is not None and compensation.variances is not None:
        return "kernels have no gradient through the variances of second-order compensation."
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for, and the sums of the kernels have no fixed order."
    return None


def arranged(x: Tensor, perm: Tensor | None) -> Tensor:
    """x [B, H, S] or [B, H, S, D] in the order of perm (int64 [1 or B * H, S]), differentiable; None: x itself."""
    if perm is None:
        return x
    b, h, s = x.shape[:3]
    index = perm.expand(b * h, s).view(b, h, s, *[1] * (x.dim() - 3))
    return x.gather(2, index.expand(x.shape))


def with_bias(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Pair:
    """q and k with two more coordinates, which add `bias` [B, Hk, Sk] to scale * q.k.

    Those of k are the bias over scale, and what rounding to the dtype of k has taken from it: with one of them the
    bias would have 8 bits in bfloat16. The gradient of the bias comes out of that of k, without a kernel of its own.
    """
    wanted = (bias / scale)[..., None]
    rounded = wanted.to(k.dtype)
    rest = (wanted - rounded.to(wanted.dtype)).to(k.dtype)
    return torch.cat([q, q.new_ones(*q.shape[:3], 2)], -1), torch.cat([k, rounded, rest], -1)


class _Kernels(torch.autograd.Function):
    """Triton forward and backward. k and v are arranged."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None,
        plan: Plan, scale: float, compensation: Compensation | None,
    ) -> Pair:  # fmt: skip
        from hasten.sparse_attn.kernels.forward import forward

        if compensation is not None and keys is not None and values is not None:
            compensation = replace(compensation, keys=keys, values=values)
        out = forward(q, k, v, plan, scale, compensation)
        ctx.save_for_backward(q, k, v, out.o, out.lse)
        ctx.plan, ctx.scale, ctx.compensation = plan, scale, compensation
        return out.o, out.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        from hasten.sparse_attn.kernels.backward import backward

        q, k, v, o, lse = ctx.saved_tensors
        found = backward(q, k, v, ctx.plan, ctx.scale, ctx.compensation, Output(o, lse), d_o, d_lse)
        return found.q, found.k, found.v, found.keys, found.values, None, None, None


class _Slabs(torch.autograd.Function):
    """The torch version. k, v and bias are arranged."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
        keys: Tensor | None, values: Tensor | None, variances: Tensor | None,
        plan: Plan, scale: float, compensation: Compensation | None,
    ) -> Pair:  # fmt: skip
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        o = torch.zeros(q.shape[0] * q.shape[1] * q.shape[2], v.shape[3], dtype=exact, device=q.device)
        lse = torch.full(o.shape[:1], -math.inf, dtype=exact, device=q.device)
        inputs = (q, k, v, bias, keys, values, variances)
        for slab in _slabs(plan, compensation is not None):
            o_part, lse_part = _attend(_leaves(inputs, slab, exact), slab, scale, compensation)
            o[slab.q_at[slab.q_real]] = o_part[slab.q_real]
            lse[slab.q_at[slab.q_real]] = lse_part[slab.q_real]
        ctx.save_for_backward(*inputs)
        ctx.plan, ctx.scale, ctx.compensation, ctx.exact = plan, scale, compensation, exact
        return o.to(q.dtype).view(*q.shape[:3], -1), lse.view(q.shape[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        sums = [None if x is None else torch.zeros(x.shape, dtype=ctx.exact, device=x.device) for x in inputs]
        d_o, d_lse = d_o.to(ctx.exact).flatten(0, 2), d_lse.to(ctx.exact).flatten()
        for slab in _slabs(ctx.plan, ctx.compensation is not None):
            leaves = _leaves(inputs, slab, ctx.exact)
            wanted = [x.requires_grad_() for x in leaves if x is not None]
            with torch.enable_grad():
                o, lse = _attend(leaves, slab, ctx.scale, ctx.compensation)
            of_o = d_o[slab.q_at] * slab.q_real[..., None]
            of_lse = d_lse[slab.q_at] * (slab.q_real & (lse > -math.inf))
            found = iter(torch.autograd.grad((o, lse), wanted, (of_o, of_lse), allow_unused=True))
            places = (slab.q_at, *[slab.k_at] * 3, *[slab.key_plane] * 3)
            for whole, leaf, at in zip(sums, leaves, places, strict=True):
                part = None if leaf is None else next(found)
                if part is not None and whole is not None:
                    rows = whole.view(-1, *part.shape[at.dim() :])
                    rows.index_add_(0, at.flatten(), part.flatten(0, at.dim() - 1))
        given = (None if x is None else x.to(old.dtype) for x, old in zip(sums, inputs, strict=True))
        return *given, None, None, None


@dataclass(frozen=True, slots=True)
class _Slab:
    """Tiles whose rows are similarly long. q_at [T, M], k_at [T, L]: places in q, k flattened over planes and tokens;
    q_real, allowed bool [T, M] and [T, 1 or M, L]; row, key_plane: [T]."""

    q_at: Tensor
    q_real: Tensor
    k_at: Tensor
    k_real: Tensor
    allowed: Tensor
    row: Tensor
    key_plane: Tensor


Inputs = tuple[Tensor | None, ...]
"""q, k, v, bias, and the keys, values and variances of a compensation."""


def _leaves(inputs: Inputs, slab: _Slab, exact: torch.dtype) -> Inputs:
    """What one slab reads of each input: [T, M, D], [T, L, D], [T, L, Dv], [T, L], and [T, C, D or Dv] thrice."""
    q, k, v, bias, *tables = inputs
    assert q is not None and k is not None and v is not None
    unread = ~slab.k_real
    q = q.reshape(-1, q.shape[-1])[slab.q_at].masked_fill(~slab.q_real[..., None], 0)
    k, v = (x.reshape(-1, x.shape[-1])[slab.k_at].masked_fill(unread[..., None], 0) for x in (k, v))
    bias = None if bias is None else bias.reshape(-1)[slab.k_at].masked_fill(unread, 0)
    tables = [None if x is None else x[slab.key_plane] for x in tables]
    return tuple(None if x is None else x.detach().to(exact) for x in (q, k, v, bias, *tables))


def _attend(leaves: Inputs, slab: _Slab, scale: float, compensation: Compensation | None) -> Pair:
    """o [T, M, Dv] and lse [T, M] of one slab: 0 and -inf where nothing is read. Differentiable."""
    q, k, v, bias, keys, values, variances = leaves
    assert q is not None and k is not None and v is not None
    logits = q @ k.mT * scale
    logits = logits if bias is None else logits + bias[:, None]
    logits = logits.masked_fill(~slab.allowed, -math.inf)
    if compensation is not None and keys is not None and values is not None:
        sizes = compensation.log_sizes.to(q.dtype)[slab.key_plane]
        stands = compensation.approximate[slab.row] & (sizes > -math.inf)
        more = q @ keys.mT * scale + sizes.masked_fill(~stands, 0)[:, None]
        if variances is not None:
            more = more + q.square() @ variances.mT * (scale * scale / 2)
        logits = torch.cat([logits, more.masked_fill(~stands[:, None], -math.inf)], -1)
        v = torch.cat([v, values], 1)
    top = logits.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    weights = (logits - top).exp()
    total = weights.sum(-1)
    nothing = total == 0
    safe = total.masked_fill(nothing, 1)
    return weights @ v / safe[..., None], (safe.log() + top[..., 0]).masked_fill(nothing, -math.inf)


def _slabs(plan: Plan, compensated: bool) -> Iterator[_Slab]:
    """The tiles of a plan, those with most keys first, as many at once as there is `ROOM` for. Reads the plan.

    Tiles that read nothing, not even what stands in, are left out: their queries may hold anything.
    """
    tokens, lengths = _row_tokens(plan)
    longest = max(1, int(plan.tile_length.max())) if plan.tile_length.numel() else 1
    work = lengths[plan.tile_row.long()]
    order = work.argsort(descending=True, stable=True)
    order = order[(plan.tile_length[order] > 0) & ((work[order] > 0) | compensated)]
    at = 0
    while at < order.numel():
        width = max(1, int(work[order[at]]))
        tiles = order[at : at + max(1, ROOM // (longest * width))]
        yield _slab(plan, tiles, tokens[:, :width], lengths, longest)
        at += tiles.numel()


def _slab(plan: Plan, tiles: Tensor, tokens: Tensor, lengths: Tensor, longest: int) -> _Slab:
    (_, hq, hk), row, plane = plan.heads, plan.tile_row[tiles].long(), plan.tile_plane[tiles].long()
    key_plane = plane // hq * hk + plane % hq // plan.groups
    slots = torch.arange(longest, device=tiles.device)
    q_real = slots < plan.tile_length[tiles].long()[:, None]
    token = (plan.tile_start[tiles].long()[:, None] + slots).clamp(max=plan.queries - 1)
    if plan.q_perm is not None:
        token = plan.q_perm[plane[:, None] if plan.q_perm.shape[0] > 1 else 0, token]
    place = tokens[row]
    k_real = torch.arange(place.shape[1], device=tiles.device) < lengths[row][:, None]
    allowed = k_real[:, None]
    if plan.mask is not None:
        position = place
        if plan.k_perm is not None:
            position = plan.k_perm[key_plane[:, None] if plan.k_perm.shape[0] > 1 else 0, place]
        allowed = allowed & plan.mask.allowed(token, position, plan.keys)
    q_at, k_at = token + plane[:, None] * plan.queries, place + key_plane[:, None] * plan.keys
    return _Slab(q_at, q_real, k_at, k_real, allowed, row, key_plane)


def _row_tokens(plan: Plan) -> Pair:
    """Arranged keys of each row, one after the other: int64 [R, most] with zeros behind, and their number [R]."""
    begin, count = plan.row_start.long(), (plan.row_end - plan.row_start).long()
    rows = torch.arange(count.numel(), device=count.device).repeat_interleave(count)
    number = torch.arange(rows.numel(), device=count.device) - (count.cumsum(0) - count)[rows]
    chunk = begin[rows] + number
    size = plan.chunk_length[chunk].long()
    lengths = torch.zeros_like(count).index_add_(0, rows, size)
    found = begin.new_zeros(count.numel(), max(1, int(lengths.max()) if lengths.numel() else 1))
    row = rows.repeat_interleave(size)
    within = torch.arange(row.numel(), device=row.device) - (size.cumsum(0) - size).repeat_interleave(size)
    slot = torch.arange(row.numel(), device=row.device) - (lengths.cumsum(0) - lengths)[row]
    found[row, slot] = plan.chunk_start[chunk].long().repeat_interleave(size) + within
    return found, lengths


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan, bias: Tensor | None, backend: str) -> None:
    b, hq, hk = plan.heads
    wanted = {"q": (b, hq, plan.queries), "k": (b, hk, plan.keys), "v": (b, hk, plan.keys), "bias": (b, hk, plan.keys)}
    for name, x in (("q", q), ("k", k), ("v", v), ("bias", bias)):
        if x is not None and tuple(x.shape[:3]) != wanted[name]:
            raise UsageError(
                f"{name} has (batch, heads, tokens) = {tuple(x.shape[:3])}, the plan was made for {wanted[name]}."
                " Make a plan for these tensors."
            )
    if q.shape[3] != k.shape[3] or not q.dtype == k.dtype == v.dtype:
        raise UsageError(
            f"q is {q.dtype} with head dimension {q.shape[3]}, k {k.dtype} with {k.shape[3]}, v {v.dtype};"
            " q and k need one head dimension, and all three one dtype."
        )
    if backend not in ("auto", "torch", "triton"):
        raise UsageError(f"There is no backend {backend!r} with gradients; allowed: auto, torch, triton.")
