"""Dense attention and its tangent in one pass: how the output moves while queries, keys and values do.

Shapes: B batch, H heads, L queries, S keys, D, Dv head dimensions; M queries of a program, N keys of one step.
q [B, H, L, D], k [B, H, S, D], v [B, H, S, Dv] and tangents tq, tk, tv alike. With s = q k^T scale + mask and P = softmax(s),

    tO = P tv + (P ts) v - rowsum(P ts) O,    ts = (tq k^T + q tk^T) scale     (products with P taken entry by entry)

Three sums grow along the keys, besides those of every online softmax, and all shrink together when the running maximum
rises: P v, P tv + (P ts) v, and rowsum(P ts). rCM (arXiv 2510.08431, algorithm 2) keeps the same sums. What differs:
tangents that are zero everywhere are not given and cost nothing (keys and values of a prompt), and masks are taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.kernels import config, launch
from hasten.sparse_attn.kernels.softmax import finish

MAX_DIM = 128
"""Largest head dimension: two sums of outputs and four tiles of keys and values have to fit where one and two do."""


class Moved(NamedTuple):
    """o, tangent [B, H, L, Dv] in the dtype of q; lse float32 [B, H, L], natural logarithm, -inf if nothing is read."""

    o: Tensor
    tangent: Tensor
    lse: Tensor


@triton.jit(do_not_specialize=["queries", "keys", "tiles"])
def _forward_tangent(
    q, k, v, tq, tk, tv, mask, o, tangent, lse, scale, queries, keys, tiles,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, tq_b, tq_h, tq_s, tk_b, tk_h, tk_s, tv_b, tv_h, tv_s,
    mask_b, mask_h, mask_s, mask_n,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SEEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """tq, tk, tv, mask: or None. SEEN: the mask says which keys are read, as bytes; it is added to scores otherwise.
    UPCAST: products of float32 (Triton's interpreter gets those of bfloat16 wrong)."""
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = plane // H, plane % H
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    real_m = rows < queries
    on_n, on_d, on_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real_d, real_dv = on_d < D, on_dv < DV

    far, inside = rows.to(tl.int64)[:, None], real_m[:, None] & real_d[None, :]
    x = _tile(q + b * q_b + h * q_h + far * q_s + on_d[None, :], inside, UPCAST)
    if tq is not None:
        tx = _tile(tq + b * tq_b + h * tq_h + far * tq_s + on_d[None, :], inside, UPCAST)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total, moved = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc, t_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tl.program_id(0) % tiles + 1) * BLOCK_M)

    for start in tl.range(0, end, BLOCK_N):
        place_n = start + on_n
        real_n, n = place_n < keys, place_n.to(tl.int64)
        y = _tile(k + b * k_b + h * k_h + n[None, :] * k_s + on_d[:, None], real_n[None, :] & real_d[:, None], UPCAST)
        z = _tile(v + b * v_b + h * v_h + n[:, None] * v_s + on_dv[None, :], real_n[:, None] & real_dv[None, :], UPCAST)
        s = tl.dot(x, y, input_precision=PRECISION) * (scale * 1.4426950408889634)
        read = real_m[:, None] & real_n[None, :]
        if CAUSAL:
            read = read & (place_n[None, :] <= rows[:, None])
        if mask is not None:
            at = mask + b * mask_b + h * mask_h + far * mask_s + n[None, :] * mask_n
            if SEEN:
                read = read & (tl.load(at, mask=read, other=0) != 0)
            else:
                s += _added(tl.load(at, mask=read, other=0.0).to(tl.float32))
        s = tl.where(read, s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(top == -float("inf"), 0.0, top)
        decay, p = tl.exp2(m - safe), tl.exp2(s - safe[:, None])
        m, total = top, total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(z.dtype), z, acc * decay[:, None], input_precision=PRECISION)
        t_acc = t_acc * decay[:, None]
        if tv is not None:
            tz_at = tv + b * tv_b + h * tv_h + n[:, None] * tv_s + on_dv[None, :]
            tz = _tile(tz_at, real_n[:, None] & real_dv[None, :], UPCAST)
            t_acc = tl.dot(p.to(z.dtype), tz, t_acc, input_precision=PRECISION)
        if tq is not None or tk is not None:
            ts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if tq is not None:
                ts = tl.dot(tx, y, ts, input_precision=PRECISION)
            if tk is not None:
                ty_at = tk + b * tk_b + h * tk_h + n[None, :] * tk_s + on_d[:, None]
                ty = _tile(ty_at, real_n[None, :] & real_d[:, None], UPCAST)
                ts = tl.dot(x, ty, ts, input_precision=PRECISION)
            w = p * ts * scale
            moved = moved * decay + tl.sum(w, 1)
            t_acc = tl.dot(w.to(z.dtype), z, t_acc, input_precision=PRECISION)

    divisor, whole = finish(m, total)
    found = acc / divisor[:, None]
    change = (t_acc - moved[:, None] * found) / divisor[:, None]
    place = plane * queries + rows
    out = place[:, None] * DV + on_dv[None, :]
    written = real_m[:, None] & real_dv[None, :]
    tl.store(o + out, found.to(o.dtype.element_ty), mask=written)
    tl.store(tangent + out, change.to(tangent.dtype.element_ty), mask=written)
    tl.store(lse + place, whole, mask=real_m)


@triton.jit
def _tile(at, real, UPCAST: tl.constexpr):
    found = tl.load(at, mask=real, other=0.0)
    if UPCAST:
        found = found.to(tl.float32)
    return found


@triton.jit
def _added(bias):
    """A bias in powers of two. The lowest float32, which hosts take for "not read", must not become -inf: a query whose
    keys are all so low reads all of them alike, as with torch."""
    return tl.where(bias == -float("inf"), bias, tl.maximum(bias, -2.0e38) * 1.4426950408889634)


KERNEL = _forward_tangent
"""What runs; `launch.interpreted` tells whether that is Triton's interpreter."""


def forward_tangent(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float, *,
    mask: Tensor | None = None, causal: bool = False,
) -> Moved:  # fmt: skip
    """softmax(q k^T scale + mask) v and how it changes along (tq, tk, tv); None for what does not move.

    One dtype: float16, bfloat16 or float32; sums are kept in float32. D and Dv up to 128. mask: bool (True is read) or
    floating (added), of any shape that expands to [B, H, L, S]. causal: query i reads keys 0 to i. A query that reads
    nothing has output and tangent 0. Raises `UsageError` for tensors that the kernel cannot read.
    """
    tensors = {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv}
    dtype = launch.same_dtype(**{name: x for name, x in tensors.items() if x is not None})
    launch.check(_forward_tangent, **tensors, mask=mask)
    check_shapes(q, k, v, tq, tk, tv, mask)
    upcast = launch.interpreted(_forward_tangent) and dtype == torch.bfloat16
    found, job = prepare(q, k, v, tq, tk, tv, scale, launch.arch(q), mask=mask, causal=causal, upcast=upcast)
    if q.shape[:3].numel():
        job.run(q)
    return Moved(found.o.to(dtype), found.tangent.to(dtype), found.lse)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float, arch: int,
    *, mask: Tensor | None = None, causal: bool = False, upcast: bool = False,
) -> tuple[Moved, launch.Launch]:  # fmt: skip
    """The launch of `forward_tangent` on a GPU of capability `arch`, and what it fills (every element of it)."""
    tensors = {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv}
    tensors = {name: None if x is None else launch.rows(x) for name, x in tensors.items()}
    (b, h, length, d), (keys, dv) = q.shape, (k.shape[2], v.shape[3])
    chosen = config.tangent_config(arch, d, dv, q.dtype)
    kind = torch.float32 if upcast else q.dtype
    o, tangent = (torch.empty(b, h, length, dv, dtype=kind, device=q.device) for _ in range(2))
    found = Moved(o, tangent, torch.empty(b, h, length, dtype=torch.float32, device=q.device))
    tiles = -(-length // chosen.block_m)
    arguments = (
        tensors | _mask_arguments(mask, (b, h, length, keys)) | found._asdict()
        | {"scale": scale, "queries": length, "keys": keys, "tiles": tiles}
        | {f"{name}_{axis}": 0 for name in ("tq", "tk", "tv") for axis in "bhs"}
        | launch.strides(**{name: x for name, x in tensors.items() if x is not None})
        | {"H": h, "D": d, "DV": dv, "BLOCK_D": launch.power(d), "BLOCK_DV": launch.power(dv)}
        | {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "CAUSAL": causal}
        | {"PRECISION": launch.precision(q.dtype), "UPCAST": upcast}
    )  # fmt: skip
    return found, launch.Launch(_forward_tangent, (tiles * b * h,), arguments, chosen.warps, chosen.stages)


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, mask: Tensor | None
) -> None:
    """Refuse shapes that do not belong together or do not fit. Raises `UsageError` with what was given and wanted."""
    if any(x.ndim != 4 for x in (q, k, v)):
        got = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise UsageError(f"The kernel takes q, k, v as [batch, heads, tokens, dimension], got {got}. Reshape them.")
    wanted = {"k": (*q.shape[:2], k.shape[2], q.shape[3]), "v": (*q.shape[:2], k.shape[2], v.shape[3])}
    wanted |= {"tq": tuple(q.shape), "tk": tuple(k.shape), "tv": tuple(v.shape)}
    for (name, shape), x in zip(wanted.items(), (k, v, tq, tk, tv), strict=True):
        if x is not None and tuple(x.shape) != shape:
            raise UsageError(f"{name} is {tuple(x.shape)}; with these tensors it has to be {shape}. Repeat it.")
    for name, dim in (("q", q.shape[3]), ("v", v.shape[3])):
        if not 1 <= dim <= MAX_DIM:
            raise UsageError(f"{name} has head dimension {dim}; this kernel takes 1 to {MAX_DIM}; torch takes any.")
    scores = (*q.shape[:3], k.shape[2])
    if mask is not None:
        given, fits = tuple(mask.shape), mask.ndim <= 4
        if not fits or any(n not in (1, full) for n, full in zip(given[::-1], scores[::-1], strict=False)):
            raise UsageError(f"The mask is {given} and does not expand to scores {scores}.")


def _mask_arguments(mask: Tensor | None, scores: tuple[int, ...]) -> dict[str, Any]:
    """A mask by the names that the kernel gives its parts; axes that it does not have are of step 0, not copied."""
    steps = (0, 0, 0, 0) if mask is None else mask.expand(scores).stride()
    seen = mask is not None and mask.dtype == torch.bool
    parts = {f"mask_{axis}": step for axis, step in zip("bhsn", steps, strict=True)}
    return parts | {"mask": mask.view(torch.uint8) if mask is not None and seen else mask, "SEEN": seen}
