"""Merging: attention over parts of the keys, put together exactly.

Shapes: o [..., Dv] and lse [...] of the same leading shape; W pieces, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import UsageError


def merge(outputs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the attention over each: (o, lse).

    outputs: o [..., Dv] and its lse [...] (natural logarithm of the softmax denominator) for each set. A query that
    read nothing in a set has lse -inf there, and its o is not looked at; one that read nothing at all gets o 0 and
    lse -inf. Sums are float32 (float64 for float64 inputs); o comes back in the dtype of the first part.
    Differentiable.

    This is the online softmax of FlashAttention (2205.14135, section 3.1) between whole parts: ring steps, shared
    prefixes (Hydragen, 2402.05099), pieces of one row (LeanAttention, 2405.10480).
    """
    if not outputs:
        raise UsageError("merge() got no parts. Give it at least one (o, lse) pair.")
    for number, (o, lse) in enumerate(outputs):
        if o.shape[:-1] != lse.shape or o.shape != outputs[0][0].shape:
            raise UsageError(
                f"merge(): part {number} has o {tuple(o.shape)} and lse {tuple(lse.shape)}; all parts have the o of"
                f" part 0, {tuple(outputs[0][0].shape)}, and lse has that shape without its last dimension."
            )
    exact = torch.promote_types(outputs[0][1].dtype, torch.float32)
    lses = torch.stack([lse.to(exact) for _, lse in outputs])
    top = finite(lses.detach().amax(0))
    weights = (lses - top).exp()
    total = weights.sum(0)
    o = torch.zeros_like(outputs[0][0], dtype=exact)
    for weight, (part, _) in zip(weights, outputs, strict=True):
        o = o + weighted(part, weight)
    return normalise(o, total, top, outputs[0][0].dtype)


def merge_rows(o: Tensor, lse: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Pieces of rows, put together: o float [W, M, Dv], lse [W, M], row int64 [W] -> o [R, M, Dv], lse [R, M]. Rows
    without a piece get o 0 and lse -inf. The twin of the merge kernel; nothing is read back from the device."""
    shape = (rows, *lse.shape[1:])
    index = row.view(-1, *[1] * (lse.dim() - 1)).expand_as(lse)
    top = lse.new_full(shape, -math.inf).scatter_reduce_(0, index, lse.detach(), "amax")
    top = finite(top)
    weights = (lse - top[row]).exp()
    total = torch.zeros_like(top).index_add(0, row, weights)
    summed = o.new_zeros((*shape, o.shape[-1])).index_add(0, row, weighted(o, weights))
    return normalise(summed, total, top, o.dtype)


def finite(top: Tensor) -> Tensor:
    """The largest logit, 0 where there is none: -inf minus -inf would be NaN."""
    return torch.where(top == -math.inf, torch.zeros_like(top), top)


def weighted(o: Tensor, weight: Tensor) -> Tensor:
    """o times its weight, 0 where that is 0: what nobody read may hold anything, NaN too."""
    seen = (weight > 0)[..., None]
    return torch.where(seen, o, torch.zeros_like(o)).to(weight.dtype) * weight[..., None]


def normalise(o: Tensor, total: Tensor, top: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(o / total in `dtype`, top + log total), 0 and -inf where the total is 0."""
    seen = total > 0
    safe = torch.where(seen, total, torch.ones_like(total))
    return (o / safe[..., None]).to(dtype), torch.where(seen, top + safe.log(), torch.full_like(top, -math.inf))
