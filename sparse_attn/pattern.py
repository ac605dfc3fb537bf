"""A pattern: one way of choosing what is read. Several of them may compete head by head.

Shapes: see `hasten.sparse_attn.blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.part import Part
from hasten.sparse_attn.blocks import Blocks, Order
from hasten.sparse_attn.layouts.layout import Identity, Layout
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.scorers.scorer import Scorer, View
from hasten.sparse_attn.segments import Tokens
from hasten.sparse_attn.selectors.selector import Selector
from hasten.sparse_attn.stand_ins.compensate import approximate_map


class Pattern(Part):
    """Tokens in the order of `layout`, pairs of blocks scored by `score`, those of `select` read."""

    layout: Layout = Identity()
    score: Scorer
    select: Selector

    def start(self) -> PatternState:
        """Fresh state of one run, branch and attention site."""
        return PatternState(self)


@dataclass(frozen=True, slots=True)
class Selection:
    """What a pattern has chosen. keep: bool [P1, Cq, Ck], roles applied. approximate: bool [P1, Cq, Ck], blocks left out
    for which something may stand in (never padding, never what a mask forbids or splits). view: what it was chosen from."""

    blocks: Blocks
    keep: Tensor
    approximate: Tensor
    view: View | None = None


class PatternState:
    """State of its three parts."""

    def __init__(self, pattern: Pattern) -> None:
        self.layout = pattern.layout.start()
        self.score = pattern.score.start()
        self.select = pattern.select.start()

    def view(
        self, q: Tensor, k: Tensor, q_tokens: Tokens, k_tokens: Tokens, scale: float, mask: Mask | None,
        v: Tensor | None = None,
    ) -> View:  # fmt: skip
        """q [B, Hq, Sq, D], k [B, Hk, Sk, D] and v [B, Hk, Sk, Dv] arranged."""
        blocks = self.layout.blocks(q, k, q_tokens, k_tokens)
        values = blocks.k.arrange(v) if v is not None and self.score.needs_values else None
        return View(blocks.q.arrange(q), blocks.k.arrange(k), blocks, q_tokens, k_tokens, scale, mask, values)

    def choose(self, view: View) -> Selection:
        """Score all pairs and select."""
        blocks = view.blocks
        keep = blocks.force(self.select.keep(self.score.scores(view), blocks))
        return Selection(blocks, keep, approximate_map(blocks, keep, groups=view.groups, mask=view.mask), view)


def by_head(found: Sequence[Selection], choice: Tensor, planes: tuple[int, int]) -> Selection:
    """Each query plane takes the selection that `choice` (int64 [Pq]) names. planes: (Pq, Pk).

    Orders of different patterns differ in their number of blocks: missing ones become empty. With grouped queries the
    heads of a group must have chosen alike, for they share the keys' order.
    """
    pq, pk = planes
    groups = pq // pk
    q = _orders([selection.blocks.q for selection in found], choice, pq)
    k = _orders([selection.blocks.k for selection in found], choice[::groups], pk)
    keep = _maps([selection.keep for selection in found], choice, pq, (q.count, k.count))
    approximate = _maps([selection.approximate for selection in found], choice, pq, (q.count, k.count))
    return Selection(Blocks(q, k), keep, approximate)


def _orders(orders: Sequence[Order], choice: Tensor, planes: int) -> Order:
    length, most = orders[0].length, max(order.count for order in orders)
    perms, bounds = [], []
    for order in orders:
        own = order.perm if order.perm is not None else torch.arange(length, device=choice.device)[None]
        perms.append(own.expand(planes, length))
        end = order.bounds.new_full((order.bounds.shape[0], most - order.count), length)
        bounds.append(torch.cat([order.bounds, end], 1).expand(planes, most + 1))
    rows = torch.arange(planes, device=choice.device)
    plain = all(order.perm is None for order in orders)
    perm = None if plain else torch.stack(perms)[choice, rows]
    longest = max(orders, key=lambda order: order.count)
    return Order(perm, torch.stack(bounds)[choice, rows], longest.roles, tokens=length)


def _maps(maps: Sequence[Tensor], choice: Tensor, planes: int, shape: tuple[int, int]) -> Tensor:
    padded = torch.zeros(len(maps), planes, *shape, dtype=torch.bool, device=choice.device)
    for number, each in enumerate(maps):
        padded[number, :, : each.shape[1], : each.shape[2]] = each
    return padded[choice, torch.arange(planes, device=choice.device)]


def unlike(selection: Selection) -> Selection:
    """The selection without what it was chosen from, to be kept for later steps."""
    return replace(selection, view=None)
