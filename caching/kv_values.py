"""In each layer, the tokens whose values have moved most are computed again; the others keep what the layer added to them.

Shapes: B texts, L slots; of one call m texts with N tokens each, n of which a layer computes; C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hasten.caching.depth import Depth, Values, put
from hasten.caching.kv import Rows, TokenKV, TokenKVState, stretches
from hasten.caching.store import KVStore, Pass
from hasten.canvas import Canvas, Row, TextFacts


class ValueDrift(TokenKV):
    """The prompt every `prompt_every` steps, the rest every `every`; in between, of the rest, the `share` whose values
    have moved most (dLLM-Cache, arXiv 2506.06295: K_p, K_r, rho).

    In each layer but the first, V of all tokens behind the prompt is computed from what goes into the layer, and
    compared with the V that the store holds: floor(rho G) tokens with the least cosine are computed, G the generated
    slots of the text. The others get what the layer added to them when they were last computed.

    Slots that were written or taken back since are always among those computed (the authors trust the cosine to find
    them). V is compared with that of the last computation, not of the last step, so that slow drift adds up. Kept are keys,
    values and the layer's sum of what attention and MLP add, one tensor instead of their two.

    prompt_every None: the prompt is treated like the rest, for models that take down in it what has been written already
    (which of its letters are used up): there every cache that freezes the prompt is wrong.
    """

    kind: ClassVar[str] = "value-drift"
    layered: ClassVar[bool] = True
    prompt_every: int | None = Field(50, ge=1)
    every: int = Field(7, ge=1)
    share: float = Field(0.25, ge=0, le=1)

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return ValueState(self, facts, store)


class ValueState(TokenKVState):
    """stale bool [B, L]: written or taken back since the last evaluation. added: per layer, what it added, [B, L + 1, C]."""

    def __init__(self, policy: ValueDrift, facts: TextFacts, store: KVStore) -> None:
        self.policy, self.store, self.shifted = policy, store, int(facts.shifted)
        self.stale = torch.zeros_like(store.present[:, :-1])
        self.added: dict[int, Tensor] = {}

    def tell(self, canvas: Canvas) -> Tensor:
        return (self.stale & canvas.used).sum(1, keepdim=True)

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        calls = []
        for prompt, rest in ((True, True), (False, True), (True, False), (False, False)):
            mine = [text for text, row in enumerate(rows) if row.open and self._due(row) == (prompt, rest)]
            spans = {text: (0 if prompt else self._behind(rows[text]), rows[text].end) for text in mine}
            for call in stretches(canvas, rows, spans):
                depth = None if rest else self._partial(call, rows, prompt)
                calls.append(replace(call, depth=depth or _Fill(self)))
        return calls

    def _due(self, row: Row) -> tuple[bool, bool]:
        period = self.policy.prompt_every
        return period is not None and row.step % period == 0, row.step % self.policy.every == 0

    def _behind(self, row: Row) -> int:
        """The first slot that counts as generated: with shifted logits, the one whose logits are about it."""
        return max(0, row.start - self.shifted) if self.policy.prompt_every is not None else 0

    def _partial(self, call: Rows, rows: Sequence[Row], prompt: bool) -> Depth:
        mine = [rows[text] for text in call.members]
        chosen = [int(self.policy.share * (row.end - self._behind(row))) for row in mine]
        counts = [max(1, count, row.told[0]) for count, row in zip(chosen, mine, strict=True)]
        if prompt:
            counts = [count + self._behind(row) for count, row in zip(counts, mine, strict=True)]
        device = self.stale.device
        first = torch.tensor([self._behind(row) for row in mine], device=device)
        must = self.stale[torch.tensor(call.members, device=device)]
        if prompt:
            must = must | (torch.arange(must.shape[1], device=device) < first[:, None])
        return _Partial(self, torch.tensor(counts, device=device), max(counts), F.pad(must, (0, 1)))

    def seen(self, done: Rows, canvas: Canvas) -> None:
        self.stale[torch.tensor(done.members, device=self.stale.device)] = False

    def changed(self, written: Tensor, erased: Tensor, canvas: Canvas) -> None:
        self.stale = self.stale | written | erased

    def keep(self, layer: int, added: Tensor, now: Pass, slots: Tensor) -> Tensor:
        """Take down what `layer` added to the tokens at `slots`; all that is known of it, [B, L + 1, C]."""
        if layer not in self.added:
            self.added[layer] = added.new_zeros(*self.store.present.shape, added.shape[2])
        self.added[layer][now.members[:, None], slots] = added
        return self.added[layer]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.added.values())


class _Fill(Depth):
    """All tokens of the call, in all layers."""

    valued = True

    def __init__(self, state: ValueState) -> None:
        self.state = state

    def leave(self, layer: int, x: Tensor, y: Tensor, index: Tensor | None, now: Pass) -> Tensor:
        self.state.keep(layer, y - x, now, now.slots)
        return y


class _Partial(Depth):
    """counts int64 [m], most: tokens to compute in each layer; must bool [m, L + 1]: slots that are among them."""

    valued = True

    def __init__(self, state: ValueState, counts: Tensor, most: int, must: Tensor) -> None:
        self.state, self.counts, self.most, self.must = state, counts, most, must

    def enter(self, layer: int, x: Tensor, now: Pass, values: Values | None) -> Tensor | None:
        if layer == 0:
            return None
        assert values is not None
        store = self.state.store
        held = store.values[layer][now.members[:, None], now.slots].flatten(2)
        near = F.cosine_similarity(values(x).float(), held.float(), dim=-1)
        near = torch.where(self.must.gather(1, now.slots), -float("inf"), near)
        near = torch.where(now.slots < store.slots, near, float("inf"))
        order = near.argsort(dim=1, stable=True)[:, : self.most]
        place = torch.arange(order.shape[1], device=order.device)
        return torch.where(place < self.counts[:, None], order, x.shape[1])

    def leave(self, layer: int, x: Tensor, y: Tensor, index: Tensor | None, now: Pass) -> Tensor:
        if index is None:
            self.state.keep(layer, y - x, now, now.slots)
            return y
        part = now.part(index, self.state.store.slots)
        near = index.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2])
        added = self.state.keep(layer, y - x.gather(1, near), now, part.slots)
        return put(x + added[now.members[:, None], now.slots], y, index)
