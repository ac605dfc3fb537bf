"""What a transformers attention mask says, in a few numbers: causal from where, window, padding, a draft's tree.
Checked, not assumed.

Shapes: B batch, n queries, S keys as the cache hands them over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """Query i of sample b reads key j when first[b] <= j < stop[b], j <= i + offset, and j > i + offset - window.

    offset: place of query 0 among the keys. end: one after the last place that any query reads (a static cache has
    more). first, stop: padding in front and behind; None: none in any sample. window: tokens, None for no window.
    tree: bool [n, n], which of the newest n keys each query reads, instead (a draft with several paths); None: causal.
    """

    offset: int
    end: int
    first: tuple[int, ...] | None = None
    stop: tuple[int, ...] | None = None
    window: int | None = None
    tree: Tensor | None = None

    @property
    def padded(self) -> bool:
        """Has any sample padding?"""
        return self.first is not None


def read(mask: Tensor | None, batch: int, queries: int, keys: int, window: int | None) -> Rule | None:
    """The rule that `mask` follows, None where it follows none of this kind.

    mask: bool [B or 1, 1, n, S] or None, which means what it means for transformers' SDPA: one query reads all keys,
    more read causally from the first key on. window: what the module says its window is; the mask decides whether it
    holds. Each element is compared with the rule, so that masks of users, packed sequences or prefix models are not
    mistaken for causal ones. Rows of padding queries, whose output nobody reads, are not. A mask that is not causal
    among the newest n keys alone, and alike for all samples, is that of a draft. Waits for the device once.
    """
    if mask is None:
        return Rule(keys - 1, keys) if queries == 1 else Rule(0, queries)
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, queries, keys) or batch % mask.shape[0]:
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
    newest = (end - queries + torch.arange(queries, device=mask.device)).clamp(min=0)
    tree = allowed.index_select(2, newest)
    older = ((allowed == (place >= first[:, None, None])) | (place >= end - queries)).all()
    drafted = older & (tree == tree[:1]).all()
    flags = torch.stack([plain, near, drafted, end]).long()
    plain_, near_, drafted_, end_, *sides = torch.cat([flags, first, stop]).tolist()
    is_draft = not (plain_ or near_) and drafted_ and end_ > queries
    if not (plain_ or near_ or is_draft) or end_ < queries:
        return None
    starts, stops = (side * (batch // mask.shape[0]) for side in (sides[: len(sides) // 2], sides[len(sides) // 2 :]))
    rule = Rule(
        end_ - queries, end_, window=window if near_ and not plain_ else None, tree=tree[0] if is_draft else None
    )
    padded = any(start > 0 for start in starts) or any(at < end_ for at in stops)
    return replace(rule, first=tuple(starts), stop=tuple(stops)) if padded else rule
