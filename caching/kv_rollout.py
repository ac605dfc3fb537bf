"""Open slots near what is known, and the tokens that attention flows to, are computed again; the rest is kept.

Shapes: B texts, L slots; of one call m texts with n computed tokens each, K keys; Hq, Hk heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hasten.caching.depth import Depth
from hasten.caching.kv import Rows, TokenKV, TokenKVState
from hasten.caching.kv_attention import attention
from hasten.caching.kv_scattered import ScatteredState
from hasten.caching.store import KVStore, Pass
from hasten.canvas import Canvas, Row, TextFacts


class Rollout(TokenKV):
    """Two stages choose what is computed again (d2Cache, arXiv 2509.23094).

    First, of the open slots of the active block the `most` (k) with the highest certainty prior: the probability of the token
    that was last predicted there, times the share of known slots around it, weighted by a Gaussian of width `spread`
    (sigma). What stands before the text counts as known, what stands behind it if its last slot is. Second, of all other
    slots those with the greatest influence, `mass` (p) of it altogether and at least one: the column sums of the attention
    rollout of the last evaluation, prod_l (A_l + I) / 2 with the mean of the heads as A_l and rows of I for tokens that were
    not computed. What was just written is always among them, and so is what stands between two chosen slots that are at most
    `gap` apart.

    The authors look for the first stage beyond the block, too, until they have k; here, logits are asked of the active block
    alone. A slot of which nothing is known yet counts as sure, so that it is asked. They multiply L x L matrices and need
    attention weights of the model; here, rows come from queries and keys, and a vector is carried from the last layer to
    the first, which gives the same sums. Texts of a batch are not filled up to the same number of tokens. every: all again at
    every so many steps; None: at the first only (the authors). While an evaluation runs, the mean attention of every layer is
    held, n x L numbers for n computed tokens.
    """

    kind: ClassVar[str] = "rollout"
    layered: ClassVar[bool] = True
    most: int = Field(32, ge=1)
    spread: float = Field(10.0, gt=0)
    mass: float = Field(0.1, ge=0, le=1)
    gap: int = Field(4, ge=0)
    every: int | None = Field(None, ge=1)

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return RolloutState(facts, self)


class RolloutState(ScatteredState):
    """certain float32 [B, L]: of the token last predicted in a slot, 1 where none was. influence float32 [B, L]: column sums
    of the last rollout."""

    def __init__(self, facts: TextFacts, policy: Rollout) -> None:
        super().__init__(facts)
        self.policy = policy
        self.certain: Tensor | None = None
        self.influence: Tensor | None = None

    def again(self, text: int, row: Row) -> bool:
        every = self.policy.every
        return row.step == 0 or every is not None and row.step % every == 0

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        return [replace(call, depth=_Attention()) for call in super().plan(canvas, rows)]

    def sure(self, confidence: Tensor, canvas: Canvas) -> None:
        was = torch.ones_like(confidence) if self.certain is None else self.certain
        self.certain = torch.where(confidence.isnan(), was, confidence)

    def seen(self, done: Rows, canvas: Canvas) -> None:
        super().seen(done, canvas)
        assert isinstance(done.depth, _Attention)
        members = torch.tensor(done.members, device=canvas.ids.device)
        if self.influence is None:
            self.influence = torch.zeros(canvas.ids.shape, device=canvas.ids.device)
        self.influence[members] = flow(done.depth.layers, canvas.used[members])

    # --- which ----------------------------------------------------------------------------------------

    def choose(self, canvas: Canvas, stale: Tensor) -> Tensor:
        if self.certain is None or self.influence is None:
            return canvas.eligible  # everything is computed now
        prior = self.certain * density(canvas, self.policy.spread)
        chosen = first(prior, canvas.eligible, self.policy.most) | stale
        chosen = chosen | nucleus(self.influence, canvas.used & ~chosen, self.policy.mass)
        return bridged(chosen, self.policy.gap)


class _Attention(Depth):
    """Takes down who attends to whom: of each layer rows [m, n, K], mean over heads, and the slots of these rows [m, n]."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def watch(self, layer: int, q: Tensor, keys: Tensor, now: Pass, scale: float) -> None:
        every = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
        self.layers.append((attention(q, keys, every, now, scale).mean(1), now.slots))


def flow(layers: Sequence[tuple[Tensor, Tensor]], used: Tensor) -> Tensor:
    """Column sums of the rollout over the slots `used` (bool [m, L]), float32 [m, L]. layers: rows of attention [m, n, K], K
    at least L, and their slots int64 [m, n], L for none; the first layer first."""
    slots = used.shape[1]
    sums = F.pad(used.float(), (0, 1))  # nobody reads the bin, so its sum stays 0
    for rows, at in reversed(layers):
        half = sums.gather(1, at) / 2
        wide = F.pad(rows, (0, slots + 1 - rows.shape[2]))
        sums = sums.scatter_add(1, at, -half) + (half[:, None] @ wide)[:, 0]
    return sums[:, :slots]


def density(canvas: Canvas, spread: float) -> Tensor:
    """The share of known slots around each slot, weighted by a Gaussian of width `spread` (cut off at four), float32
    [B, L]."""
    reach = math.ceil(4 * spread)
    known = (canvas.used & ~canvas.masked).float()
    last = known.gather(1, (canvas.end - 1).clamp(min=0)[:, None])
    known = torch.where(canvas.place < canvas.end[:, None], known, last)
    around = torch.cat([torch.ones_like(last).expand(-1, reach), known, last.expand(-1, reach)], 1)
    weight = torch.exp(-(torch.arange(-reach, reach + 1, device=known.device) ** 2) / (2 * spread**2))
    return F.conv1d(around[:, None], (weight / weight.sum())[None, None])[:, 0]


def first(key: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` highest of `key` [B, L] among the slots `among`, bool [B, L]. Ties: the earlier slot."""
    order = torch.where(among, key, -float("inf")).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(among).scatter(1, order[:, :count], True) & among


def nucleus(key: Tensor, among: Tensor, mass: float) -> Tensor:
    """The highest of `key` (float [B, L], not negative) among the slots `among` that together have at most the share `mass`
    of its sum there, and at least one of them; bool [B, L]."""
    order = torch.where(among, key, -1.0).argsort(dim=1, descending=True, stable=True)
    sorted_ = torch.where(among, key, 0.0).gather(1, order)
    within = (sorted_.cumsum(1) <= mass * sorted_.sum(1, keepdim=True)) & (sorted_ > 0)
    within[:, :1] = True
    return torch.zeros_like(among).scatter(1, order, within) & among


def bridged(chosen: Tensor, gap: int) -> Tensor:
    """`chosen` (bool [B, L]), and what stands between two of them that are at most `gap` slots apart."""
    slots = chosen.shape[1]
    place = torch.arange(slots, device=chosen.device)
    before = torch.where(chosen, place, -slots - gap).cummax(1).values
    behind = torch.where(chosen, place, 2 * slots + gap).flip(1).cummin(1).values.flip(1)
    return chosen | (behind - before <= gap)
