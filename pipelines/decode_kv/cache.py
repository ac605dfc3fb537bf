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
from transformers.cache_utils import CacheLayerMixin

from hasten.caching.decode.kept import KeptCache, KeptState
from hasten.caching.decode.packed import NONE
from hasten.caching.decode.score import Seen
from hasten.caching.decode.slots import Slots, View
from hasten.errors import UsageError
from hasten.sparse_attn.text.reader import ReaderState

if TYPE_CHECKING:
    from hasten.pipelines.decode_kv.session import KVSession


LATE = 32
"""Tokens that a layer with a window may hold beyond it, so that not every new token moves all others."""


class KVLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: what transformers asks of it, answered from `slots`. levels: what several rows share, read before what
    they have of their own. view: what its attention is about to read. reader: state of what reads some of it; selected:
    its calls."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: KVCache, number: int) -> None:
        super().__init__()
        self.cache, self.number, self.slots = cache, number, Slots()
        self.levels: list[Slots] = []
        self.view: View | None = None
        self.pending: Seen | None = None
        self.reader: ReaderState | None = None
        self.selected = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new tokens stand behind what is held; their attention commits them, unless they are a draft."""
        now = self.cache.now
        if now is None:
            raise UsageError(
                "This cache belongs to a model that hasten has accelerated, and this call did not go through it. Use the cache"
                " with that model while its session is open; other models make a cache of their own."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.slots.scratch(key_states, value_states, now.at, now.reads, now.holes)
        self.view = self.slots.view()
        return self.view.k, self.view.v

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Once for the whole cache, when the first layer is asked."""
        if self.number == 0 and tokens_to_remove:
            self.cache.shorten(-tokens_to_remove)

    def reset(self) -> None:
        if self.number == 0:
            self.cache.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.number == 0:
            self.cache.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.number == 0:
            rows = torch.arange(len(self.cache.lengths), device=self.device)
            self.cache.rows(rows.repeat_interleave(repeats))


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

    lengths: tokens of each row so far, padding not counted; columns: tokens with padding, which transformers counts.
    from_generate: did `generate` make it, which reads the logits of the last token alone?
    choosing: is a prompt read for the sake of choosing its tokens? repacked: do positions follow what was chosen?
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
        self.columns = 0
        self.state: KeptState = self.part.start(len(self.layers))
        self._next: tuple[Tensor, Tensor] | None = None
        self._open: Now | None = None
        self._wrote = self._broken = False
        self.choosing = self.repacked = False
        for layer in self.layers:
            layer.slots, layer.levels, layer.view, layer.pending = Slots(), [], None, None
            layer.reader, layer.selected = None, 0

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
        self.now = Now(at, holes, None, new, n > 1 or not any(self.lengths), False)
        return self.now

    def _drafted(self, base: Tensor, n: int) -> Now:
        assert self._next is not None
        reads, depth = self._next
        if reads.shape[-1] != n:
            raise UsageError(f"A draft of {reads.shape[-1]} tokens was announced, and the model was called with {n}.")
        return Now(base + depth, False, reads, [], False, True)

    def end(self, done: bool) -> None:
        """The call is over; done=False: it failed, and the cache with it if a layer had committed its tokens."""
        now, self.now = self.now, None
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
        self.lengths = [self.lengths[row] for row in order]
        for layer in self.layers:
            if layer.is_initialized:
                layer.slots.rows(index)
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

    @property
    def bytes(self) -> int:
        """Bytes of memory held: slots, their places and notes, and what scores remember."""
        slots = [slots for layer in self.layers for slots in (*layer.levels, layer.slots)]
        held: int = sum(each.bytes for each in slots) + self.state.bytes
        return held
