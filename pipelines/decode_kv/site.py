"""One attention module of a model with a cache policy: what it reads, and when the policy has its say.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hasten.caching.decode.score import Seen
from hasten.errors import RefusedError
from hasten.pipelines.decode_kv.attention import attend, attend_levels
from hasten.pipelines.decode_kv.cache import KVCache, KVLayer

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
        window = extra.pop("sliding_window", None)
        o = self._read(q, layer, scale, window, extra)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        host = (self.module, hidden, named) if cache.part.score.asks_host else (None, None, None)
        cache.settle(layer, Seen(layer.number, q, now.at, view.k, view.v, scale, now.prompt, window, *host))
        return o

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
        view, now = layer.view, layer.cache.now
        assert now is not None
        keys, scale = view.k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
        drafted = view.reads is not None and view.reads.shape[0] > 1
        if window is not None or layer.levels or drafted or not reader.acts_on(layer.number, self.session.layers):
            return None
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
                return None
        if keys < reader.min_tokens:
            return None
        tree = None if view.reads is None else view.reads[0]
        o = layer.reader.attend(q, view.k, view.v, first, scale, tree).o
        layer.selected += 1
        return o.transpose(1, 2).contiguous()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """The registered function. Modules that nobody attached, and other caches, get SDPA."""
    site, cache, hidden, named = kwargs.pop(CALL, (None, None, None, None))
    if site is None or cache is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return site.attend(query, cache, scaling, hidden, named, kwargs), None


def register() -> None:
    """Name our function in transformers' registries. A name that nobody uses changes nothing for other models."""
    AttentionInterface.register(NAME, torch.compiler.disable(_attention))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(NAME, sdpa_mask)
