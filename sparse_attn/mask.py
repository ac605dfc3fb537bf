"""Which key positions a query position may read at all: causal, windows, draft trees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import UsageError


@dataclass(frozen=True, slots=True)
class Mask:
    """Query i (its position in the sequence) may read key j when -left <= j - (i + offset) <= right.

    left, right: tokens; None is unlimited. offset: position of query 0 among the keys; with a KV cache, keys minus
    queries. tree: bool [Sq, n], for the last n keys (a draft tree): tree[i, j] says whether query i may read the j-th of
    them, instead of the rule above. Positions are those of the sequence, whatever the layout.
    """

    left: int | None = None
    right: int | None = 0
    offset: int = 0
    tree: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"Mask.{name} is {value}; windows reach 0 or more tokens, None is unlimited.")

    def allowed(self, q_pos: Tensor, k_pos: Tensor, keys: int) -> Tensor:
        """bool [..., len(q_pos), len(k_pos)] for int positions [..., Mq] and [..., Nk]. keys: Sk."""
        distance = k_pos[..., None, :] - (q_pos[..., :, None] + self.offset)
        found = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            found &= distance >= -self.left
        if self.right is not None:
            found &= distance <= self.right
        if self.tree is not None:
            first = keys - self.tree.shape[1]
            inside = (k_pos >= first)[..., None, :].expand_as(found)
            column = (k_pos - first).clamp(min=0)
            found = torch.where(inside, self.tree[q_pos[..., :, None], column[..., None, :]], found)
        return found


def causal(queries: int, keys: int) -> Mask:
    """Each query reads the keys up to its own position; the last query stands at the last key."""
    return Mask(left=None, right=0, offset=keys - queries)
