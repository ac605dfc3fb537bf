"""Attention over what a cache holds: from the places of its slots, never from a mask that the model made.

Shapes: see `hasten.caching.decode`; G = Hq / Hk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hasten.caching.decode.mass import allowed
from hasten.caching.decode.view import View
from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.text.exact import LOGITS, attend_all, attend_some


def readable(view: View, at: Tensor, window: int | None) -> Tensor | None:
    """Which slots each new token reads: bool [B, P, N, S + N]; None where that is all of them, or, with several new tokens
    and nothing before them, all that are not behind (plain causal attention)."""
    n, total = at.shape[1], view.k.shape[2]
    if view.reads is None and not view.holes and window is None and (n == 1 or n == total):
        return None
    mask = allowed(at, view.place, window)
    if view.reads is not None:
        mask[..., total - n :] &= view.reads[:, None]
    return mask


def attend(
    module: nn.Module, q: Tensor, view: View, at: Tensor, scale: float | None, window: int | None, extra: dict[str, Any]
) -> Tensor:
    """o [B, N, Hq, Dv] of q [B, Hq, N, D] over the slots of `view`; at int [B, N]: the places of the new tokens.

    The very call that the model would make, on what is held: with nothing evicted and nothing packed its bits are the
    model's own.
    """
    mask = readable(view, at, window)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    o, _ = sdpa_attention_forward(module, q, view.k, view.v, mask, scaling=scale, **extra)
    return o  # type: ignore[no-any-return]


def attend_with_lse(q: Tensor, view: View, at: Tensor, scale: float, window: int | None) -> Output:
    """The same with the LSE: o [B, Hq, N, Dv] in the dtype of q, lse float32 [B, Hq, N]. Parts of a text that are held
    elsewhere (a shared prefix) merge exactly (`sparse_attn.merge`)."""
    (b, hq, n, d), hk = q.shape, view.k.shape[1]
    groups = hq // hk
    rows = q.reshape(b, hk, groups * n, d)
    mask = readable(view, at, window)
    if mask is None and n == 1:
        o, lse = attend_all(rows, view.k, view.v, scale)
    else:
        mask = allowed(at, view.place, window) if mask is None else mask
        o, lse = _some(rows, view, mask, groups, scale)
    return Output(o.reshape(b, hq, n, -1).to(q.dtype), lse.reshape(b, hq, n).float())


def attend_shared(q: Tensor, level: View, scale: float) -> Output:
    """Attention of q [B, Hq, N, D] over what B / Bs rows that stand next to each other share, `level` of Bs rows: their
    queries are one matrix, so that each key is read once for all of them (Hydragen, 2402.05099)."""
    (b, hq, n, d), (shared, hk) = q.shape, level.k.shape[:2]
    each, groups = b // shared, hq // hk
    rows = q.reshape(shared, each, hk, groups * n, d).transpose(1, 2).reshape(shared, hk, each * groups * n, d)
    if level.holes:
        o, lse = attend_some(rows, level.k, level.v, scale, (level.place >= 0)[:, :, None])
    else:
        o, lse = attend_all(rows, level.k, level.v, scale)
    o = o.reshape(shared, hk, each, groups * n, -1).transpose(1, 2).reshape(b, hq, n, -1)
    return Output(o.to(q.dtype), lse.reshape(shared, hk, each, groups * n).transpose(1, 2).reshape(b, hq, n).float())


def attend_levels(q: Tensor, levels: Sequence[View], view: View, at: Tensor, scale: float) -> Tensor:
    """o [B, N, Hq, Dv] over shared levels and what each row has of its own, merged by their LSE: exact."""
    parts = [attend_shared(q, level, scale) for level in levels] + [attend_with_lse(q, view, at, scale, None)]
    return merge([(part.o, part.lse) for part in parts])[0].transpose(1, 2).contiguous()


def _some(rows: Tensor, view: View, mask: Tensor, groups: int, scale: float) -> tuple[Tensor, Tensor]:
    """In slices of queries, so that few logits are held at once. mask: bool [B, P, N, S + N]."""
    n = mask.shape[2]
    step = max(1, LOGITS // max(1, rows.shape[0] * rows.shape[1] * groups * view.k.shape[2]))
    (b, hk), d = rows.shape[:2], rows.shape[3]
    q = rows.view(b, hk, groups, n, d)
    parts = []
    for start in range(0, n, step):
        piece = q[:, :, :, start : start + step]
        seen = mask[:, :, start : start + step].repeat(1, 1, groups, 1)
        o, lse = attend_some(piece.flatten(2, 3), view.k, view.v, scale, seen)
        parts.append((o.view(b, hk, groups, piece.shape[3], -1), lse.view(b, hk, groups, piece.shape[3])))
    return torch.cat([o for o, _ in parts], 3).flatten(2, 3), torch.cat([lse for _, lse in parts], 3).flatten(2, 3)
