"""When to compute everything again, and from which layer on: when the attention of the most-attended token has moved.

Shapes: B texts, L slots, layers numbered from 0; of one call m texts with N tokens each, n of which a layer computes;
Hq, Hk heads, K keys (L or L + 1), D head dimension, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hasten.caching.depth import Depth, Values
from hasten.caching.kv import Rows, TokenKV, TokenKVState, alike, stretches
from hasten.caching.store import KVStore, Pass, numbered
from hasten.canvas import Canvas, Row, TextFacts


class AttentionDrift(TokenKV):
    """Open slots of the active block, tokens just written and tracked tokens at every step; everything from layer l + 1 on
    when the attention of the token tracked in layer l has moved (Elastic-Cache, arXiv 2510.14973).

    In each layer T is the written token that the open slots of the active block (the paper's M_beta: take a sliding block
    rule) attend to most, argmax_k sum_q S[q, k]. When T is computed again, its attention over all keys is compared with
    that of the step before: sigma = cos(S_T before, S_T now), mean over heads. Where sigma < `below` (gamma), the layers
    behind compute all tokens, from the inputs kept of them.

    Attention weights are never asked of the model: S is the product of these few queries with the keys. A T that was
    not tracked before has no row to be compared with if it was not computed in that step; then sigma counts from the next.
    wait: decide within the step, as the paper does, which makes the host wait in every layer; by default a step's decision
    is carried out in the next, which it reaches with the one look that every step takes. every: everything again at
    every so many steps, None for never but the first (the paper).
    """

    kind: ClassVar[str] = "attention-drift"
    layered: ClassVar[bool] = True
    below: float = Field(0.9, ge=0)
    wait: bool = False
    every: int | None = Field(None, ge=1)

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return DriftState(self, facts, store)


class DriftState(TokenKVState):
    """stale bool [B, L]: written or taken back since it was computed. inputs: what goes into layer l and, as number
    `layers`, what comes out of the last, [B, L + 1, C]. tracked int64 [layers, B]: T, L for none; rows: its attention
    [B, Hq, L + 1], float32; known bool, near float32 [layers, B]: whether that is known, and sigma of the last step (inf where it was not tested)."""

    def __init__(self, policy: AttentionDrift, facts: TextFacts, store: KVStore) -> None:
        self.policy, self.store, self.layers, self.shifted = policy, store, facts.layers, facts.shifted
        present = store.present
        self.stale = torch.zeros_like(present[:, :-1])
        self.tokens = self.stale
        shape = (facts.layers, len(present))
        self.tracked = torch.full(shape, store.slots, device=present.device)
        self.known = torch.zeros(shape, dtype=torch.bool, device=present.device)
        self.near = torch.full(shape, float("inf"), device=present.device)
        self.rows: dict[int, Tensor] = {}
        self.inputs: dict[int, Tensor] = {}

    def tell(self, canvas: Canvas) -> Tensor:
        followed = torch.zeros_like(self.store.present).scatter(1, self.tracked.T, True)[:, :-1]
        tokens = canvas.eligible | self.stale | followed
        if self.shifted:
            tokens = tokens | F.pad(canvas.eligible, (0, 1))[:, 1:]
        self.tokens = tokens & canvas.used
        moved = self.near < self.policy.below
        first = torch.where(moved.any(0), moved.long().argmax(0), self.layers)
        return torch.stack([self.tokens.sum(1), first], 1)

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        """Texts with the same boundary share a call; that of a text whose last layers moved, or none, is `layers`."""
        boundaries = {text: self._boundary(row) for text, row in enumerate(rows) if row.open}
        calls = []
        for boundary in sorted(set(boundaries.values())):
            mine = [text for text in boundaries if boundaries[text] == boundary]
            if boundary == self.layers and not self.policy.wait:
                found = [self._few(canvas, rows, members) for members in alike({text: rows[text].told[0] for text in mine})]
            else:
                found = stretches(canvas, rows, {text: (0, rows[text].end) for text in mine})
            calls += [replace(call, depth=_Drift(self, call, boundary, canvas, rows)) for call in found]
        return calls

    def _boundary(self, row: Row) -> int:
        """The last layer that computes few tokens; -1: all layers compute all."""
        if row.step == 0 or self.policy.every is not None and row.step % self.policy.every == 0:
            return -1
        return self.layers if self.policy.wait or row.told[1] >= self.layers - 1 else row.told[1]

    def _few(self, canvas: Canvas, rows: Sequence[Row], members: list[int]) -> Rows:
        width = max(rows[text].told[0] for text in members)
        full = all(rows[text].end == canvas.slots for text in members)
        tokens = self.tokens[torch.tensor(members, device=self.tokens.device)]
        return Rows(members, tokens, width, runs=0, full=full)

    def seen(self, done: Rows, canvas: Canvas) -> None:
        self.stale[torch.tensor(done.members, device=self.stale.device)] = False

    def changed(self, written: Tensor, erased: Tensor, canvas: Canvas) -> None:
        self.stale = self.stale | written | erased

    @property
    def bytes(self) -> int:
        tensors = [*self.rows.values(), *self.inputs.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Drift(Depth):
    """One call. boundary: of each text, the last layer that computes `tokens` alone; narrow: the call has no others."""

    def __init__(self, state: DriftState, call: Rows, boundary: int, canvas: Canvas, rows: Sequence[Row]) -> None:
        self.state, self.boundary, self.narrow = state, [boundary] * len(call.members), call.runs == 0
        members = torch.tensor(call.members, device=state.stale.device)
        self.tokens = F.pad(state.tokens[members], (0, 1))
        self.width = max(rows[text].told[0] for text in call.members)
        self.masks = F.pad(canvas.eligible[members], (0, 1))
        self.most = max(1, *(rows[text].left for text in call.members))
        self.written = F.pad((canvas.used & ~canvas.masked)[members], (0, 1))
        self.few: Tensor | None = None

    def enter(self, layer: int, x: Tensor, now: Pass, values: Values | None) -> Tensor | None:
        fresh = [layer > boundary for boundary in self.boundary]
        if self.narrow or all(fresh):
            return None
        count = x.shape[1]
        if self.few is None:
            self.few = numbered(self.tokens.gather(1, now.slots), min(self.width, count), count)
        if not any(fresh):
            return self.few
        every = torch.arange(count, device=x.device).expand(len(fresh), -1)
        few = F.pad(self.few, (0, count - self.few.shape[1]), value=count)
        return torch.where(torch.tensor(fresh, device=x.device)[:, None], every, few)

    def leave(self, layer: int, x: Tensor, y: Tensor, index: Tensor | None, now: Pass) -> Tensor:
        state = self.state
        slots = now.slots if index is None else now.part(index, state.store.slots).slots
        if layer + 1 not in state.inputs:
            state.inputs[layer + 1] = y.new_zeros(*state.store.present.shape, y.shape[2])
        state.inputs[layer + 1][now.members[:, None], slots] = y
        if state.policy.wait:
            moved = (state.near[layer, now.members] < state.policy.below).tolist()
            self.boundary = [min(b, layer) if far else b for b, far in zip(self.boundary, moved, strict=True)]
        return y if index is None else state.inputs[layer + 1][now.members[:, None], now.slots]

    def watch(self, layer: int, q: Tensor, keys: Tensor, now: Pass, scale: float) -> None:
        state, slots = self.state, self.state.store.slots
        if layer not in state.rows:
            shape = (len(state.store.present), q.shape[1], slots + 1)
            state.rows[layer] = torch.zeros(shape, dtype=torch.float32, device=q.device)
        state.near[layer, now.members] = self._sigma(layer, q, keys, now, scale)
        masks = numbered(self.masks.gather(1, now.slots), min(self.most, q.shape[2]), q.shape[2])
        weights = attention(q, keys, masks, now, scale) * (masks < q.shape[2])[:, None, :, None]
        sums = F.pad(weights.sum((1, 2)), (0, slots + 1 - keys.shape[2])).masked_fill(~self.written, -1.0)
        tracked = torch.where(self.written.any(1), sums.argmax(1), slots)
        state.tracked[layer, now.members] = tracked
        row, computed = self._row(q, keys, tracked, now, scale)
        state.rows[layer][now.members], state.known[layer, now.members] = row, computed

    def _sigma(self, layer: int, q: Tensor, keys: Tensor, now: Pass, scale: float) -> Tensor:
        """How near the attention of each text's tracked token is to what it was, float32 [m]; inf where nothing says so."""
        state = self.state
        fresh = [layer > boundary for boundary in self.boundary]
        nothing = torch.full((len(fresh),), float("inf"), device=q.device)
        if all(fresh):
            return nothing
        row, computed = self._row(q, keys, state.tracked[layer, now.members], now, scale)
        sigma = F.cosine_similarity(row, state.rows[layer][now.members], dim=-1).mean(1)
        tested = computed & state.known[layer, now.members]
        if any(fresh):
            tested = tested & ~torch.tensor(fresh, device=q.device)
        return torch.where(tested, sigma, nothing)

    def _row(self, q: Tensor, keys: Tensor, token: Tensor, now: Pass, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of one slot of each text, int64 [m], over all slots: [m, Hq, L + 1]; and whether it was computed."""
        here = (now.slots == token[:, None]) & (token[:, None] < self.state.store.slots)
        row = attention(q, keys, here.long().argmax(1, keepdim=True), now, scale)[:, :, 0]
        return F.pad(row, (0, self.state.store.slots + 1 - keys.shape[2])), here.any(1)


def attention(q: Tensor, keys: Tensor, index: Tensor, now: Pass, scale: float) -> Tensor:
    """softmax(scale q k) of some of the queries q [m, Hq, n, D]: float32 [m, Hq, r, K] for index int64 [m, r].

    A number n gives any row.
    """
    (texts, heads, count, dim), (_, key_heads, width, _) = q.shape, keys.shape
    near = index.clamp(max=count - 1)
    rows = q.gather(2, near[:, None, :, None].expand(-1, heads, -1, dim))
    grouped = rows.reshape(texts, key_heads, -1, dim)
    s = (grouped.float() @ keys.transpose(-1, -2).float()).view(texts, heads, -1, width) * scale
    if now.visible is not None:
        seen = now.visible.expand(texts, -1, -1).gather(1, near[..., None].expand(-1, -1, width))
        s = s.masked_fill(~seen[:, None], -float("inf"))
    return s.softmax(-1)
