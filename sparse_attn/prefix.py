"""Shared prefixes: many samples read one prompt's keys as one matrix product (Hydragen, 2402.05099).

Shapes: B batch, Hq, Hk heads, n new queries per sample, P tokens of a shared part, D, Dv head dimensions, Bs copies of the
shared part (each shared by B / Bs samples that stand next to each other).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.decode import Backend, Work, decode
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.merge import finite, merge, normalise
from hasten.sparse_attn.plan import Output

LOGITS = 1 << 24
"""Logits held at once where no library kernel returns the LSE: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Level:
    """Keys and values that a run of samples shares: k [Bs, Hk, P, D], v [Bs, Hk, P, Dv].

    Bs = 1: all samples (a system prompt); Bs = B: each sample its own (a suffix); between: a tree of prefixes, as when
    several continuations are drawn for each of several questions. work: where given, only its places are read, by
    `decode` (ragged suffixes); it needs Bs = B. mask: which query reads which of these keys, by the query's number among
    the n new ones and the key's place in this level.
    """

    k: Tensor
    v: Tensor
    work: Work | None = None
    mask: Mask | None = None


def attend_levels(q: Tensor, levels: Sequence[Level], scale: float | None = None, backend: Backend = "auto") -> Output:
    """Attention of q [B, Hq, n, D] over the keys of all levels together, exact whatever is shared.

    The queries of all samples that share a level stand in one matrix, so its keys are read once for all of them
    (Hydragen, section 3.2; its hierarchical form, 3.3); the levels are merged by their LSE. `levels` are disjoint sets
    of keys; positions were applied (rotary embeddings) before.
    """
    if not levels:
        raise UsageError("attend_levels() got no levels. Give it at least one `Level`.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = [_level(q, level, scale, backend) for level in levels]
    o, lse = merge([(part.o, part.lse) for part in parts])
    return Output(o, lse)


def _level(q: Tensor, level: Level, scale: float, backend: Backend) -> Output:
    b, hq, n, d = q.shape
    shared = level.k.shape[0]
    if shared < 1 or b % shared or (level.work is not None and shared != b):
        raise UsageError(
            f"A level of {shared} copies cannot be shared by {b} samples; 1, {b} or a divisor of {b} can"
            f"{', and with `work` each sample has its own' if level.work is not None else ''}."
        )
    if level.work is not None:
        return decode(q, level.k, level.v, level.work, scale=scale, mask=level.mask, backend=backend)
    if shared == b:
        return exact(q, level.k, level.v, scale, level.mask)
    each = b // shared
    folded = q.view(shared, each, hq, n, d).transpose(1, 2).reshape(shared, hq, each * n, d)
    out = exact(folded, level.k, level.v, scale, level.mask, n)
    o = out.o.view(shared, hq, each, n, -1).transpose(1, 2).reshape(b, hq, n, -1)
    return Output(o, out.lse.view(shared, hq, each, n).transpose(1, 2).reshape(b, hq, n))


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask | None = None, period: int | None = None) -> Output:
    """Dense attention with its LSE: q [B, Hq, m, D], k [B, Hk, P, D], v [B, Hk, P, Dv].

    mask: as in `Level`; the queries' positions are 0 to `period` - 1 again and again (None: 0 to m - 1). Without a mask
    and with Dv = D, CPUs use torch's flash kernel; else logits are held for at most `LOGITS` pairs at a time.
    """
    b, hq, m, d = q.shape
    groups, places = hq // k.shape[1], k.shape[2]
    rows = q.reshape(b, k.shape[1], groups * m, d)  # queries of one key head together: its keys are read once
    if mask is None and _flash(q, v):
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, k, v, 0.0, False, scale=scale)
        return Output(o.reshape(b, hq, m, -1), lse.reshape(b, hq, m).float())
    position = torch.arange(m, device=q.device) % (period or m)
    position = position.repeat(groups)
    at_once = max(1, LOGITS // max(1, b * k.shape[1] * places))
    parts = []
    for start in range(0, groups * m, at_once):
        piece = slice(start, start + at_once)
        allowed = None
        if mask is not None:
            allowed = mask.allowed(position[piece], torch.arange(places, device=q.device), places)
        parts.append(_rows(rows[:, :, piece], k, v, scale, allowed))
    o = torch.cat([part for part, _ in parts], 2).reshape(b, hq, m, -1)
    return Output(o.to(q.dtype), torch.cat([part for _, part in parts], 2).reshape(b, hq, m).float())


def _rows(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    high = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(high) @ k.to(high).mT * scale
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    if not k.shape[2]:
        return logits.new_zeros(*q.shape[:-1], v.shape[-1]), logits.new_full(q.shape[:-1], -math.inf)
    top = finite(logits.detach().amax(-1))
    weights = (logits - top[..., None]).exp()
    return normalise(weights @ v.to(high), weights.sum(-1), top, high)


def _flash(q: Tensor, v: Tensor) -> bool:
    """Does torch's CPU flash kernel, which returns the LSE, take these?"""
    plain = q.dtype in (torch.float32, torch.bfloat16, torch.float16) and q.shape[-1] == v.shape[-1]
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or v.requires_grad)
    return q.device.type == "cpu" and plain and v.shape[2] > 0 and not needs_grad
