"""One layer of a cache with a policy, as transformers knows it.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hasten.caching.decode.score import Seen
from hasten.caching.decode.slots import Slots
from hasten.caching.decode.view import View
from hasten.errors import UsageError
from hasten.sparse_attn.text.reader import ReaderState

if TYPE_CHECKING:
    from hasten.pipelines.decode_kv.cache import KVCache


class KVLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: what transformers asks of it, answered from `slots`. levels: what several rows share, read before what
    they have of their own. view: what its attention is about to read. reader: state of what reads some of it; selected:
    its calls. prepared: how often slots had moved when it saw the prompt. partly: does the view leave out what is packed?
    given: the keys and values that the last call got, until its attention has them."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: KVCache, number: int) -> None:
        super().__init__()
        self.cache, self.number, self.slots = cache, number, Slots()
        self.levels: list[Slots] = []
        self.view: View | None = None
        self.pending: Seen | None = None
        self.reader: ReaderState | None = None
        self.selected = self.prepared = 0
        self.partly = False
        self.given: tuple[Tensor, Tensor] | None = None

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
        self.partly = self.reader is not None and not now.prompt and self.slots.partly and self.slots.moves == self.prepared
        if self.partly:  # its reader says what is unpacked
            self.view = self.slots.near()
            self.given = key_states, value_states
        else:
            self.given = self.whole()
        return self.given

    def whole(self) -> tuple[Tensor, Tensor]:
        """Let all that is held be read."""
        lazy, before = self.cache.state.lazy, self.slots.slots
        self.view, self.partly = self.slots.view(), False
        if lazy is not None and lazy.alive is not None and before:
            self.view = self.view.of(lazy.alive)
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
