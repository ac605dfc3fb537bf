"""How much attention each slot gets: column sums of the softmax, in slices of queries, never the weights of the whole.

Shapes: see `hasten.caching.decode`; n queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOGITS = 1 << 22
"""Logits held at once: 16 MiB in float32."""


def allowed(at: Tensor, place: Tensor, window: int | None = None) -> Tensor:
    """Which slots each query may read: bool [B, P, n, S] for queries at places at [B, n] and slots of places [B, P, S]:
    those that hold something that is not behind the query, and, with a window, not farther than window - 1 tokens."""
    own, there = at[:, None, :, None], place[:, :, None, :]
    inside = (there >= 0) & (there <= own)
    return inside if window is None else inside & (there > own - window)


def mass(
    q: Tensor, k: Tensor, at: Tensor, place: Tensor, scale: float, *,
    window: int | None = None, noise: Tensor | None = None, tau: float = 1.0,
) -> Tensor:  # fmt: skip
    """Softmax weight that each slot gets, added over the n queries and the query heads of a key head: float32 [B, Hk, S].

    q [B, Hq, n, D], k [B, Hk, S, D]; at int [B, n] (negative: padding, which asks nothing), place int [B, P, S]. noise:
    float32 [B, 1 or Hk, S], added to the logits before they are divided by tau (Keyformer). Exact in float32; at most
    `LOGITS` of it is held at a time.
    """
    (b, hq, n, d), (hk, slots) = q.shape, k.shape[1:3]
    groups = hq // hk
    step = max(1, LOGITS // max(1, b * hq * slots))
    total = torch.zeros(b, hk, slots, dtype=torch.float32, device=q.device)
    keys = k.float()
    for start in range(0, n, step):
        rows = q[:, :, start : start + step].float()
        logits = rows.reshape(b, hk, groups * rows.shape[2], d) @ keys.mT * scale
        logits = logits.view(b, hk, groups, rows.shape[2], slots)
        if noise is not None:
            logits = (logits + noise[:, :, None, None]) / tau
        seen = allowed(at[:, start : start + step], place, window)[:, :, None]
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        total += weights.masked_fill(~seen, 0.0).sum((2, 3))
    return total
