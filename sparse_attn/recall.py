"""How much of its softmax mass a head has read: measured on a few queries, which no stand-in can make look better.

Compensation gives an estimate of that share for free (`Output.rho`). It is within a hundredth where blocks are
clusters, and far off where they are not: over blocks in raster order heads have been told 0.9 where it was 0.3. A measured share costs `samples` rows of dense scores per head and is right everywhere.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D head dimension, M sampled queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.segments import Tokens
from hasten.sparse_attn.sums import slices

GOLDEN = 0.6180339887498949
"""Multiples of it spread evenly over 0 to 1, and keep no step with the rows and columns of a grid, as equal distances do."""


def sampled_recall(
    q: Tensor, k: Tensor, lse: Tensor, q_tokens: Tokens, k_tokens: Tokens, scale: float, *,
    samples: int = 64, mask: Mask | None = None,
) -> Tensor:  # fmt: skip
    """Mean share of the softmax mass that sampled sparse queries have read: float32 [B * Hq], 1 without such queries.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D] in original order; lse [B, Hq, Sq] of what was read exactly. The same queries are
    sampled in every head and at every call.
    """
    b, hq = q.shape[:2]
    rows = torch.tensor(sampled(q_tokens, samples), dtype=torch.int64, device=q.device)
    if not rows.numel():
        return torch.ones(b * hq, device=q.device)
    groups, keys = hq // k.shape[1], k.flatten(0, 1)
    some = q[:, :, rows].reshape(keys.shape[0], groups * rows.numel(), -1)
    barred = ~readable_keys(k_tokens, b, k.device)[:, None, :]
    if mask is not None:
        barred = barred | ~mask.allowed(rows, torch.arange(k.shape[2], device=k.device), k.shape[2])
    barred = barred.expand(b, rows.numel(), -1)
    full = []
    for part in slices(keys.shape[0], max(groups * rows.numel(), keys.shape[2]) * keys.shape[1]):
        logits = torch.bmm(some[part].float(), keys[part].float().mT).mul_(scale)
        sample = torch.arange(keys.shape[0], device=k.device)[part] // k.shape[1]
        logits = logits.view(-1, groups, *barred.shape[1:]).masked_fill_(barred[sample][:, None], -math.inf)
        full.append(logits.logsumexp(-1))
    total = torch.cat(full).view(b, hq, -1)
    share = (lse[:, :, rows].float() - total).exp().nan_to_num(0.0).clamp(max=1.0)
    real = total > -math.inf
    return ((share * real).sum(-1) / real.sum(-1).clamp(min=1)).masked_fill(~real.any(-1), 1.0).reshape(-1)


def sampled(tokens: Tokens, samples: int) -> list[int]:
    """Positions of at most `samples` of the sparse queries, spread over all of them; the same ones each time."""
    ranges = [
        (start, segment.length)
        for start, segment in zip(tokens.starts, tokens.segments, strict=True)
        if segment.queries == "sparse"
    ]
    total = sum(length for _, length in ranges)
    if total <= samples:
        return [start + at for start, length in ranges for at in range(length)]
    found = []
    for number in range(samples):
        at = int((number + 0.5) * GOLDEN % 1 * total)
        for start, length in ranges:
            if at < length:
                found.append(start + at)
                break
            at -= length
    return found


def readable_keys(tokens: Tokens, batch: int, device: torch.device) -> Tensor:
    """Keys that are not padding: bool [1 or B, Sk]."""
    parts = []
    for segment in tokens.segments:
        own = torch.full((1, segment.length), segment.keys != "never", device=device)
        if segment.valid is not None:
            own = own & (torch.arange(segment.length, device=device) < segment.valid.to(device)[:, None])
        parts.append(own)
    planes = max(part.shape[0] for part in parts)
    assert planes in (1, batch)
    return torch.cat([part.expand(planes, -1) for part in parts], 1)
