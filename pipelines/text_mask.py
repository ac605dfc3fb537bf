"""What a transformers attention mask says, in a few numbers: causal from where, window, padding. Checked, not assumed.

Shapes: B batch, n queries, S keys as the cache hands them over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """Query i of sample b reads key j when first[b] <= j < stop[b], j <= i + offset, and j > i + offset - window.

    offset: place of query 0 among the keys. end: one after the last place that any query reads (a static cache has
    more). first, stop: padding in front and behind; None: none in any sample. window: tokens, None for no window.
    """

    offset: int
    end: int
    first: tuple[int, ...] | None = None
    stop: tuple[int, ...] | None = None
    window: int | None = None

    @property
    def padded(self) -> bool:
        """Has any sample padding?"""
        return self.first is not None


def read(mask: Tensor | None, batch: int, queries: int, keys: int, window: int | None) -> Rule | None:
    """The rule that `mask` follows, None where it follows none of this kind.

    mask: bool [B or 1, 1, n, S] or None, which means what it means for transformers' SDPA: one query reads all keys,
    more read causally from the first key on. window: what the module says its window is; the mask decides whether it
    holds. Each element is compared with the rule, so that masks of users, packed sequences or prefix models are not
    mistaken for causal ones. Rows of padding queries, whose output nobody reads, are not. Waits for the device once.
    """
    if mask is None:
        return Rule(keys - 1, keys) if queries == 1 else Rule(0, queries)
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (queries, keys):
        return None
    allowed = mask[:, 0]
    place = torch.arange(keys, device=mask.device)
    seen = allowed.any(1)
    first = torch.where(seen, place, keys).amin(1)
    stop = torch.where(seen, place + 1, 0).amax(1)
    end = stop.max()
    query = torch.arange(queries, device=mask.device)[:, None] + end - queries
    inside = (place >= first[:, None, None]) & (place < stop[:, None, None]) & (place <= query)
    real = query >= first[:, None, None]
    plain = ((allowed == inside) | ~real).all()
    near = plain if window is None else ((allowed == (inside & (place > query - window))) | ~real).all()
    plain_, near_, end_, *sides = torch.cat([torch.stack([plain, near, end]).long(), first, stop]).tolist()
    if not (plain_ or near_) or end_ < queries:
        return None
    starts, stops = (side * (batch // mask.shape[0]) for side in (sides[: len(sides) // 2], sides[len(sides) // 2 :]))
    kept = window if not plain_ else None
    if all(start == 0 for start in starts) and all(at == end_ for at in stops):
        return Rule(end_ - queries, end_, window=kept)
    return Rule(end_ - queries, end_, tuple(starts), tuple(stops), kept)
