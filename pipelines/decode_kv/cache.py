"""transformers' `Cache` on top of `Slots`: the number of tokens drives positions, the number of slots drives memory.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from hasten.caching.decode.kept import KeptCache, KeptState
from hasten.caching.decode.lazy import LazyState
from hasten.caching.decode.packed import NONE
from hasten.caching.decode.score import Seen
from hasten.caching.decode.slots import Slots
from hasten.errors import UsageError
from hasten.pipelines.decode_kv.layer import KVLayer

if TYPE_CHECKING:
    from hasten.pipelines.decode_kv.session import KVSession


LATE = 32
"""Tokens that a layer with a window may hold beyond it, so that not every new token moves all others."""


@dataclass(frozen=True, slots=True)
class Now:
    """The call of the model that is under way: at int [B, N], the places of its tokens (`NONE`: padding); holes: is there
    padding? reads: of a draft, bool [B or 1, N, N]. new: tokens of each row. prompt: several tokens, not drafted."""

    at: Tensor
    holes: bool
    reads: Tensor | None
    new: list[int]
    prompt: bool
    drafted: bool


class KVCache(Cache):  # type: ignore[misc]
    """What a session gives `generate` in the place of a `DynamicCache`; `session.cache()` makes one by hand.

    lengths: tokens of each row so far, padding not counted; unread: tokens of each row's prompt that were not chosen; columns: tokens with padding, which transformers counts.
    from_generate: did `generate` make it, which reads the logits of the last token alone?
    choosing: is a prompt read for the sake of choosing its tokens? repacked: do positions follow what was chosen? prunes: may
    this call leave tokens out of deeper layers? angles: what it passes to its layers for positions.
    A draft: `draft(reads, depth)`, one call of the model, `commit(index)` or `discard()`.
    """

    def __init__(self, session: KVSession, layers: int, part: KeptCache) -> None:
        self.session, self.part = session, part
        self.now: Now | None = None
        self.from_generate = False
        super().__init__(layers=[KVLayer(self, number) for number in range(layers)])
        self.clear()

    def clear(self) -> None:
        """As new."""
        self.lengths: list[int] = []
        self.unread: list[int] = []
        self.columns = 0
        self.state: KeptState = self.part.start(len(self.layers))
        self._next: tuple[Tensor, Tensor] | None = None
        self._open: Now | None = None
        self._begun: Now | None = None
        self._wrote = self._broken = self.prunes = False
        self.angles: Any = None
        self.choosing = self.repacked = False
        for layer in self.layers:
            layer.slots, layer.levels, layer.view, layer.pending = Slots(), [], None, None
            layer.reader, layer.selected, layer.prepared, layer.partly = None, 0, 0, False

    # --- one call of the model ----------------------------------------------------------------------

    def begin(self, batch: int, n: int, valid: Tensor | None, device: torch.device) -> Now:
        """A call with n new tokens for each of `batch` rows; valid: bool [B, n], False where there is padding."""
        if self._open is not None:
            raise UsageError("This cache has an open draft. Commit or discard it before the model is called again.")
        if self._broken:
            raise UsageError("A call of the model with this cache failed half-way, and layers have gone apart. Start with a new cache.")
        if not self.lengths:
            self.lengths = [0] * batch
        if len(self.lengths) != batch:
            raise UsageError(f"This cache holds {len(self.lengths)} texts, and the model was called with {batch}.")
        base = torch.tensor(self.lengths, device=device)[:, None]
        if self._next is not None:
            self.now = self._drafted(base, n)
            return self.now
        holes = valid is not None and not bool(valid.all())
        if valid is None or not holes:
            at, new = base + torch.arange(n, device=device), [n] * batch
        else:
            at = (base + valid.cumsum(1) - 1).masked_fill(~valid, NONE)
            new = valid.sum(1).tolist()
        self.now = self._begun = Now(at, holes, None, new, n > 1 or not any(self.lengths), False)
        if self.state.lazy is not None:
            self._begin_lazily(self.state.lazy, self.now, base[:, 0])
        return self.now

    def _begin_lazily(self, lazy: LazyState, now: Now, before: Tensor) -> None:
        self.prunes = now.at.shape[1] == 1 or self.from_generate
        if self.prunes and now.holes and bool((now.at[:, -1] < 0).any()):
            self.prunes = False
            self.session.note("A text is padded behind its end, so that its last token is not the last of the call; nothing was left out of it.")
        if now.at.shape[1] > 1 and not self.from_generate:
            self.session.note("A call outside generate wants every token's logits, and every layer computed every token for it.")
        lazy.begin(sum(now.new), before)

    @property
    def ends(self) -> int:
        """No token of the call under way stands at this place or behind it."""
        assert self.now is not None
        return max(self.lengths) + self.now.at.shape[1]

    @property
    def wide(self) -> int:
        """Tokens of each row in the call under way, padding included, before layers left some of them out."""
        assert self._begun is not None
        return self._begun.at.shape[1]

    def narrow(self, at: Tensor) -> None:
        """The next layers compute tokens at these places, int [B, n], `NONE` for padding."""
        assert self.now is not None
        if at is not self.now.at:
            self.now = replace(self.now, at=at, holes=bool((at < 0).any()))

    def _drafted(self, base: Tensor, n: int) -> Now:
        assert self._next is not None
        reads, depth = self._next
        if reads.shape[-1] != n:
            raise UsageError(f"A draft of {reads.shape[-1]} tokens was announced, and the model was called with {n}.")
        return Now(base + depth, False, reads, [], False, True)

    def end(self, done: bool) -> None:
        """The call is over; done=False: it failed, and the cache with it if a layer had committed its tokens."""
        now, self.now, self._begun = self._begun or self.now, None, None
        assert now is not None
        self._broken, self._wrote = self._wrote and not done, False
        for layer in self.layers:
            layer.view = None
            if not done and layer.slots.tail is not None:
                layer.slots.discard()
        if now.drafted:
            self._next = None
            self._open = now if done else None
        elif done:
            self.columns += now.at.shape[1]
            self.lengths = [length + new for length, new in zip(self.lengths, now.new, strict=True)]

    def settle(self, layer: KVLayer, seen: Seen) -> None:
        """A layer's attention has read; unless this is a draft, its tokens stay, and the policy says what leaves."""
        now = self.now
        assert now is not None
        if now.drafted:
            layer.pending = seen
            return
        layer.slots.commit()
        self._wrote = True
        self._after(layer, seen, [length + new for length, new in zip(self.lengths, now.new, strict=True)])

    def _after(self, layer: KVLayer, seen: Seen, lengths: Sequence[int]) -> None:
        if seen.window is not None and any(held > seen.window + (0 if seen.prompt else LATE) for held in layer.slots.tokens):
            out = torch.tensor(lengths, device=seen.q.device)[:, None, None] - seen.window
            layer.slots.keep(layer.slots.place >= out)
        view = layer.slots.view() if self.state.evicts else None
        if view is not None:
            seen = replace(seen, k=view.k, v=view.v)
        self.state.after(layer.slots, seen, lengths)

    def share(self, times: int) -> None:
        """What each row holds is shared by `times` rows from now on, which stand next to each other (Hydragen)."""
        for layer in self.layers:
            layer.levels.append(layer.slots)
            layer.slots = Slots()
        self.lengths = [length for length in self.lengths for _ in range(times)]

    # --- drafts -------------------------------------------------------------------------------------

    def draft(self, reads: Tensor, depth: Tensor) -> None:
        """The next call's n tokens are a draft. reads: bool [B or 1, n, n], which of them each reads (its ancestors and
        itself); depth: int [B or 1, n], how far each is from the end of its row, 0 for the next token."""
        if self.state.lazy is not None:
            raise UsageError("Drafts would read other tokens in each layer than the last accepted one chose. Take lazy-llm without drafts.")
        self._next = reads, depth

    def commit(self, index: Tensor, counts: list[int] | None = None) -> None:
        """Keep the accepted path of each row: int64 [B, A], numbers of draft tokens in order, `NONE` (-1) behind the last.
        counts: how many each row keeps, where the host knows (else this waits for the device once)."""
        now = self._the_open("commit")
        counts = (index >= 0).sum(1).tolist() if counts is None else counts
        lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        taken = (index[:, :, None] == torch.arange(now.at.shape[1], device=index.device)).any(1)
        at = now.at.masked_fill(~taken, NONE)
        for layer in self.layers:
            layer.slots.commit(index, counts)
            if layer.pending is not None:
                layer.pending, seen = None, layer.pending
                self._after(layer, replace(seen, at=at), lengths)
        self.lengths, self._open = lengths, None
        self.columns = max(self.columns, max(lengths))

    def discard(self) -> None:
        """Nothing of the draft was accepted."""
        self._the_open("discard")
        self._open = None
        for layer in self.layers:
            layer.slots.discard()
            layer.pending = None

    def _the_open(self, what: str) -> Now:
        if self._open is None:
            raise UsageError(f"KVCache.{what}(): there is no draft. Announce one with draft() and call the model first.")
        return self._open

    # --- as a whole -----------------------------------------------------------------------------------

    def rows(self, index: Tensor) -> None:
        """These rows, int64 [m], a row perhaps several times."""
        order = index.tolist()
        for level in self.layers[0].levels:
            each = len(self.lengths) // len(level.ends)
            if len(order) != len(self.lengths) or any(row // each != place // each for place, row in enumerate(order)):
                raise UsageError("Rows that share a prefix cannot change places with rows that do not. Leave `shared` out of the recipe.")
        self.lengths, self.unread = [self.lengths[row] for row in order], [self.unread[row] for row in order if self.unread]
        for layer in self.layers:
            if layer.is_initialized:
                layer.slots.rows(index)
            if layer.reader is not None:
                layer.reader.rows(index)
        self.state.rows(index)

    def shorten(self, tokens: int) -> None:
        """Take the newest tokens of every row back; what was evicted because of them does not return."""
        if self.layers[0].levels and any(held < tokens for held in self.layers[0].slots.tokens):
            raise UsageError("A shared prefix cannot be taken back. Leave `shared` out of the recipe.")
        self.lengths = [length - tokens for length in self.lengths]
        self.columns -= tokens
        for layer in self.layers:
            if layer.is_initialized:
                end = torch.tensor(self.lengths, device=layer.slots.place.device)[:, None, None]
                layer.slots.keep(layer.slots.place < end)
        if self.state.lazy is not None:
            self.state.lazy.shorten(torch.tensor(self.lengths))

    @property
    def bytes(self) -> int:
        """Bytes of memory held: slots, their places and notes, and what scores and readers remember."""
        slots = [slots for layer in self.layers for slots in (*layer.levels, layer.slots)]
        read = sum(layer.reader.num_bytes() for layer in self.layers if layer.reader is not None)
        held: int = sum(each.bytes for each in slots) + self.state.bytes + read
        return held

    @property
    def far_bytes(self) -> int:
        """Bytes held beside these in the CPU's memory, by codecs that put values there."""
        return sum(layer.slots.far_bytes for layer in self.layers)
