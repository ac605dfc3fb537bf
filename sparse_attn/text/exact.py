"""Dense attention of a few queries over many keys, with its LSE: the exact parts of decoding.

Shapes: B batch, Hq, Hk heads, G = Hq / Hk, m queries, P keys, D, Dv head dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.merge import finite, normalise
from hasten.sparse_attn.plan import Output

LOGITS = 1 << 24
"""Logits held at once where no library kernel returns the LSE: 64 MiB in float32."""


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask | None = None, period: int | None = None) -> Output:
    """Attention of q [B, Hq, m, D] over all of k [B, Hk, P, D], v [B, Hk, P, Dv], or what `mask` allows of it.

    mask: positions of keys are their places, those of the queries 0 to `period` - 1 again and again (None: 0 to m - 1).
    The queries that share a key head are one matrix, so that each key is read once for all of them.
    """
    b, hq, m, d = q.shape
    groups, places = hq // k.shape[1], k.shape[2]
    rows = q.reshape(b, k.shape[1], groups * m, d)
    if mask is None:
        o, lse = attend_all(rows, k, v, scale)
        return Output(o.reshape(b, hq, m, -1).to(q.dtype), lse.reshape(b, hq, m).float())
    position = (torch.arange(m, device=q.device) % (period or m)).repeat(groups)
    place = torch.arange(places, device=q.device)
    at_once = max(1, LOGITS // max(1, b * k.shape[1] * places))
    parts = []
    for start in range(0, groups * m, at_once):
        piece = slice(start, start + at_once)
        parts.append(attend_some(rows[:, :, piece], k, v, scale, mask.allowed(position[piece], place, places)))
    o = torch.cat([part for part, _ in parts], 2).reshape(b, hq, m, -1)
    return Output(o.to(q.dtype), torch.cat([part for _, part in parts], 2).reshape(b, hq, m).float())


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(o, lse) of q [B, H, m, D] over all of k [B, H, P, D], v [B, H, P, Dv].

    CPUs use torch's flash kernel where it takes these (the operator under `scaled_dot_product_attention` returns the
    LSE); else logits are held for at most `LOGITS` pairs at a time.
    """
    plain = q.dtype in (torch.float32, torch.bfloat16, torch.float16) and q.shape[-1] == v.shape[-1]
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and plain and k.shape[2] > 0 and not needs_grad:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
        return o, lse
    at_once = max(1, LOGITS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [attend_some(q[:, :, at : at + at_once], k, v, scale) for at in range(0, max(1, q.shape[2]), at_once)]
    return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def attend_some(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(o, lse) in float32 (float64 for float64) of q [..., m, D] over the keys of k [..., P, D], v [..., P, Dv] that
    `allowed` (bool, broadcast to [..., m, P]) names, all logits at once. 0 and -inf where it names none."""
    high = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(high) @ k.to(high).mT * scale
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    if not k.shape[-2]:
        return logits.new_zeros(*q.shape[:-1], v.shape[-1]), logits.new_full(q.shape[:-1], -math.inf)
    top = finite(logits.detach().amax(-1))
    weights = (logits - top[..., None]).exp()
    return normalise(weights @ v.to(high), weights.sum(-1), top, high)
