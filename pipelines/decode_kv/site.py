"""One attention module of a model with a cache policy: what it reads, and when the policy has its say.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hasten.caching.decode.low_rank import LowRank
from hasten.caching.decode.score import Seen
from hasten.caching.decode.turns import Turns
from hasten.errors import RefusedError
from hasten.pipelines.decode_kv.attention import attend, attend_levels
from hasten.pipelines.decode_kv.cache import KVCache
from hasten.pipelines.decode_kv.fits import handed_on
from hasten.pipelines.decode_kv.layer import KVLayer

if TYPE_CHECKING:
    from hasten.pipelines.decode_kv.session import KVSession

NAME = "hasten-kv"
"""Of our function in transformers' registry of attention functions, and of SDPA's masks in that of masks."""

CALL = "hasten_kv_call"
"""Keyword that an attached module's forward hands through to our attention function: which site, cache and input."""


class Chosen(Exception):
    """What the layer that decides has seen: its queries and keys [B, H, n, D], and the scale of its logits."""

    def __init__(self, q: Tensor, k: Tensor, scale: float) -> None:
        super().__init__()
        self.q, self.k, self.scale = q, k, scale


@dataclass(slots=True)
class Site:
    """One attention module of an attached model."""

    session: KVSession
    module: nn.Module

    def forward(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The module's forward, which tells our attention function the site and the cache."""

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            cache = next((given for given in (*kwargs.values(), *args) if isinstance(given, Cache)), None)
            ours = cache if isinstance(cache, KVCache) and cache.session is self.session else None
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            return own(*args, **kwargs, **{CALL: (self, ours, hidden, kwargs)})

        return forward

    def heed(self, layer: KVLayer, key: Tensor, value: Tensor) -> None:
        """What is about to be read has to be what the cache gave."""
        given, layer.given = layer.given, None
        if not handed_on(given, key, value):
            raise RefusedError(
                f"{type(self.module).__name__} changes keys or values between the cache and its attention, or reads them twice, so a cache"
                " policy cannot be right on it. Take a recipe that drafts, such as look-up, or none."
            )

    def attend(self, q: Tensor, cache: KVCache, scale: float | None, hidden: Any, named: Any, extra: dict[str, Any]) -> Tensor:
        """o [B, N, Hq, Dv] over what the cache holds; then the policy has its say."""
        for name in ("softcap", "s_aux", "position_bias"):
            if extra.get(name) is not None:
                raise RefusedError(f"Attention of {type(self.module).__name__} has {name}, which cache policies do not know.")
        if extra.get("output_attentions"):
            raise RefusedError("Attention weights are asked for, and a cache policy does not hold them. Leave output_attentions out.")
        layer = cache.layers[int(self.module.layer_idx)]  # type: ignore[arg-type]
        assert isinstance(layer, KVLayer) and layer.view is not None and cache.now is not None
        view, now = layer.view, cache.now
        if cache.choosing and layer.number == self.session.deciding:
            raise Chosen(q, view.k, q.shape[-1] ** -0.5 if scale is None else scale)
        window = extra.pop("sliding_window", None) or self.session.windows[layer.number]
        if layer.number == 0 and isinstance(cache.part.codec, LowRank):
            self._note_turns(cache, named, q.shape[-1])
        o = self._read(q, layer, scale, window, extra)
        scale, view = q.shape[-1] ** -0.5 if scale is None else scale, layer.view
        lazy = cache.state.lazy
        if lazy is not None and layer.number in lazy.shares and cache.prunes:
            lengths = [length + new for length, new in zip(cache.lengths, now.new, strict=True)]
            lazy.weigh(layer.number, q, view.k, now.at, view.place, lengths, scale)
        host = (self.module, hidden, named) if cache.part.score.asks_host else (None, None, None)
        cache.settle(layer, Seen(layer.number, q, now.at, view.k, view.v, scale, now.prompt, window, *host))
        return o

    def _note_turns(self, cache: KVCache, named: dict[str, Any], width: int) -> None:
        """How the model turns keys by position, for a codec that undoes it."""
        given, now = named.get("position_embeddings"), cache.now
        assert now is not None
        if cache.state.turns is None and not turns_by_halves(self.module, given, width):
            self.session.note(
                f"How {type(self.module).__name__} turns keys is not known, and they are decomposed as they stand, which takes a higher"
                " rank; if that is how they are before any position, nothing is lost."
            )
            return
        if cache.state.turns is None:
            cache.state.turns = Turns()
        cos, sin = given  # type: ignore[misc]
        cache.state.turns.write(cos, sin, now.at, cache.ends)

    def _read(
        self, q: Tensor, layer: KVLayer, scale: float | None, window: int | None, extra: dict[str, Any]
    ) -> Tensor:
        """What a layer reads: o [B, N, Hq, Dv]."""
        assert layer.view is not None and layer.cache.now is not None
        if self.session.reader is not None:
            found = self._selected(q, layer, scale, window)
            if found is not None:
                return found
        if layer.levels:
            levels = [level.view() for level in layer.levels]
            return attend_levels(q, levels, layer.view, layer.cache.now.at, q.shape[-1] ** -0.5 if scale is None else scale)
        return attend(self.module, q, layer.view, layer.cache.now.at, scale, window, extra)

    def _selected(self, q: Tensor, layer: KVLayer, scale: float | None, window: int | None) -> Tensor | None:
        """What a reader of the `attention` axis makes of it; None where it has no say: prompts, windows, rows of several
        lengths, and what the recipe keeps dense."""
        reader = self.session.reader
        assert reader is not None and reader.cache is not None and layer.view is not None
        now = layer.cache.now
        assert now is not None
        keys, scale = layer.slots.slots + q.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
        drafted = now.reads is not None and now.reads.shape[0] > 1
        silent = window is not None or layer.levels or drafted or not reader.acts_on(layer.number, self.session.layers)
        if layer.partly:
            found = None if silent or keys < reader.min_tokens else self._unpacked(q, layer, scale)
            if found is not None:
                return found
            layer.whole()
        if silent:
            return None
        view = layer.view
        first = None
        if view.holes:
            first = (view.place >= 0).int().argmax(-1).amin(1)
            if bool(((view.place >= 0).sum(-1) != keys - first[:, None]).any()):
                self.session.note("Rows hold different numbers of tokens, which readers of the attention axis do not know; they are read in full.")
                return None
        if layer.reader is None or now.prompt:
            layer.reader = reader.cache.start()
            if now.prompt:
                layer.reader.prepare(q, view.k, view.v, first, scale)
                layer.prepared = layer.slots.moves
                return None
        if keys < reader.min_tokens:
            return None
        tree = None if view.reads is None else view.reads[0]
        o = layer.reader.attend(q, view.k, view.v, first, scale, tree).o
        layer.selected += 1
        return o.transpose(1, 2).contiguous()

    def _unpacked(self, q: Tensor, layer: KVLayer, scale: float) -> Tensor | None:
        """The reader's choice of what is packed, and what is not packed; None where it cannot choose without seeing all."""
        slots, now = layer.slots, layer.cache.now
        assert layer.reader is not None and now is not None
        place = slots.place[..., : slots.behind]
        first = (place >= 0).int().argmax(-1).amin(1) if slots.holes else None
        uneven = first is not None and bool(((place >= 0).sum(-1) != slots.behind - first[:, None]).any())
        index = None if uneven else layer.reader.places(q, slots.behind, first, scale)
        if index is None:
            return None
        layer.selected += 1
        return attend(self.module, q, slots.view_of(index), now.at, scale, None, {})


def turns_by_halves(module: nn.Module, given: Any, width: int) -> bool:
    """Does a module turn number i and i + R / 2 of its keys, of `width` numbers, by `given`, cosines and sines [B, n, R]? Its file's own function is
    asked."""
    own = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if own is None or not isinstance(given, tuple) or len(given) != 2 or given[0].dim() != 3:
        return False
    cos, sin = (x[:1, -1:].float() for x in given)
    turns = Turns()
    place = torch.zeros(1, 1, dtype=torch.int64, device=cos.device)
    turns.write(cos, sin, place, 1)
    x = torch.linspace(-1, 1, width, device=cos.device).view(1, 1, 1, -1)
    try:
        turned = own(x, x, cos, sin)[1]
    except (TypeError, RuntimeError, ValueError):
        return False
    return torch.allclose(turned, turns.made(x, place[:, None]), atol=1e-5)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """The registered function. Modules that nobody attached, and other caches, get SDPA."""
    site, cache, hidden, named = kwargs.pop(CALL, (None, None, None, None))
    if site is None or cache is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    site.heed(cache.layers[int(module.layer_idx)], key, value)  # type: ignore[arg-type]
    return site.attend(query, cache, scaling, hidden, named, kwargs), None


def register() -> None:
    """Name our function in transformers' registries. A name that nobody uses changes nothing for other models."""
    AttentionInterface.register(NAME, torch.compiler.disable(_attention))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(NAME, sdpa_mask)
