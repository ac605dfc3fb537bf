"""Attention of a plan: the one call that everything else is built around.

Shapes: B batch, Hq, Hk heads (Hq a multiple of Hk), Sq, Sk tokens, D, Dv head dimensions, Pk = B * Hk planes of keys, C
key blocks, R rows of the plan.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.errors import RefusedError, UsageError
from hasten.sparse_attn.backends.choice import Backend, choose
from hasten.sparse_attn.blocks import arrange
from hasten.sparse_attn.density import Cost, cost, density, flops, pairs, tile_density
from hasten.sparse_attn.plan import Compensation, Output, Plan

__all__ = [
    "Backend", "Cost", "Output", "choose", "cost", "density", "flops", "pairs", "sparse_attention", "tile_density",
]  # fmt: skip

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None,
    compensation: Compensation | None = None, backend: str | Backend = "auto", arranged: bool = False,
) -> Output:  # fmt: skip
    """softmax(scale q k^T) v over the keys that `plan` reads, with its logarithmic denominators.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] of one dtype (float16, bfloat16, float32; float64 in plain
    torch), on the plan's device, in original order; the output is, too. arranged: k and v are in the order of
    `plan.k_perm` already (whoever makes compensation needs them so anyway); else they are arranged here.
    scale: 1/sqrt(D) by default. compensation: what stands in for blocks that are not read.
    backend: "auto", a name, or what `choose` gave back for calls like this one.

    A plan that reads everything is dense attention to rounding. Queries that read nothing get 0 and LSE -inf. Sums are
    float32. Forward only: for gradients there is `hasten.sparse_attn.autograd.planned_attention`.

    Raises `UsageError` where shapes, dtypes or devices do not go together, `RefusedError` where gradients would be lost
    or the backend that was named cannot run the plan.
    """
    check(q, k, v, plan, compensation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise UsageError(f"sparse_attention: scale is {scale}; it has to be a finite number, usually 1/sqrt(head dim).")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RefusedError(
            "sparse_attention computes no gradients, and one of q, k, v wants them. Call it under torch.no_grad(), or"
            " use hasten.sparse_attn.autograd.planned_attention for training."
        )
    if not arranged:
        k, v = arrange(k, plan.k_perm), arrange(v, plan.k_perm)
    if isinstance(backend, str):
        backend = choose(q, v, plan, compensation, backend)
    return backend.execute(q, k, v, plan, scale, compensation)


def check(q: Tensor, k: Tensor, v: Tensor, plan: Plan, compensation: Compensation | None = None) -> None:
    """Refuse what does not go together, with a `UsageError` that says what was got and what is allowed."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise UsageError(f"sparse_attention: {name} is {list(x.shape)}, not [batch, heads, tokens, head dim].")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise UsageError(
                f"sparse_attention: {name} is {x.dtype} and q {q.dtype}; all three have one dtype, float16, bfloat16,"
                " float32 or float64."
            )
        if x.device != plan.row_start.device:
            raise UsageError(
                f"sparse_attention: {name} is on {x.device}, the plan on {plan.row_start.device}; pack the plan from"
                " tensors of that device."
            )
    b, hq, hk = plan.heads
    wanted = {
        "q": (q, (b, hq, plan.queries, q.shape[3])),
        "k": (k, (b, hk, plan.keys, q.shape[3])),
        "v": (v, (b, hk, plan.keys, v.shape[3])),
    }
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != shape:
            raise UsageError(
                f"sparse_attention: {name} is {list(x.shape)}; the plan is for {list(shape)} (batch, heads, tokens,"
                " head dim). A plan belongs to one shape: make another with hasten.sparse_attn.pack.pack."
            )
    if compensation is not None:
        _check_compensation(compensation, (b * hk, q.shape[3], v.shape[3]), plan)


def _check_compensation(found: Compensation, dims: tuple[int, int, int], plan: Plan) -> None:
    planes, d, dv = dims
    blocks, rows = found.keys.shape[1], plan.row_start.numel()
    wanted = {
        "keys": (found.keys, (planes, blocks, d)),
        "values": (found.values, (planes, blocks, dv)),
        "log_sizes": (found.log_sizes, (planes, blocks)),
        "approximate": (found.approximate, (rows, blocks)),
        "variances": (found.variances, (planes, blocks, d)),
    }
    for name, (x, shape) in wanted.items():
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise UsageError(
                f"sparse_attention: compensation.{name} is {list(x.shape)}; for this plan it has to be {list(shape)}."
                " Make it with compensate.centroids from the blocks that the plan was packed from."
            )
        if x.device != plan.row_start.device:
            raise UsageError(
                f"sparse_attention: compensation.{name} is on {x.device}, the plan on {plan.row_start.device}."
            )
    if found.approximate.dtype != torch.bool:
        raise UsageError(f"sparse_attention: compensation.approximate is {found.approximate.dtype}; it has to be bool.")
