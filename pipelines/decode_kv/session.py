"""A cache policy on one causal language model: attached, at work, taken off."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hasten.caching.decode.kept import KeptCache
from hasten.caching.decode.score import Seen
from hasten.errors import RefusedError, UsageError
from hasten.limits import Limits
from hasten.pipelines.causal.attention import attention_modules
from hasten.pipelines.decode_kv.attention import attend
from hasten.pipelines.decode_kv.cache import KVCache, KVLayer
from hasten.pipelines.decode_kv.report import KVReport, report_of
from hasten.recipe import Recipe
from hasten.session import Attachment

NAME = "hasten-kv"
"""Of our function in transformers' registry of attention functions, and of SDPA's masks in that of masks."""

CALL = "hasten_kv_call"
"""Keyword that an attached module's forward hands through to our attention function: which site, cache and input."""


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
            hidden = next((given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)), None)
            return own(*args, **kwargs, **{CALL: (self, ours, hidden, kwargs)})

        return forward

    def attend(self, q: Tensor, cache: KVCache, scale: float | None, hidden: Tensor, named: Any, extra: dict[str, Any]) -> Tensor:
        """o [B, N, Hq, Dv] over what the cache holds; then the policy has its say."""
        for name in ("softcap", "s_aux", "position_bias"):
            if extra.get(name) is not None:
                raise RefusedError(f"Attention of {type(self.module).__name__} has {name}, which cache policies do not know.")
        if extra.get("output_attentions"):
            raise RefusedError("Attention weights are asked for, and a cache policy does not hold them. Leave output_attentions out.")
        layer = cache.layers[int(self.module.layer_idx)]  # type: ignore[arg-type]
        assert isinstance(layer, KVLayer) and layer.view is not None and cache.now is not None
        view, now = layer.view, cache.now
        window = extra.pop("sliding_window", None)
        o = self.session.read(self, q, layer, scale, window, extra)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        host = (self.module, hidden, named) if cache.part.score.asks_host else (None, None, None)
        cache.settle(layer, Seen(layer.number, q, now.at, view.k, view.v, scale, now.prompt, window, *host))
        return o


class KVSession:
    """A context manager: `model.generate(...)` inside it keeps what the policy says; `report()` says what that was.

    Closing puts everything back. caches: those that are alive; the last one is kept for the report.
    """

    def __init__(self, model: Any, recipe: Recipe, limits: Limits | None = None) -> None:
        self.host, self.recipe, self.limits = model, recipe, limits or Limits()
        self.part = _part(recipe)
        self.last: KVCache | None = None
        self.notes: list[str] = []
        self._attachment = Attachment()
        self._closed = False
        modules = attention_modules(model)
        if any(module.config._attn_implementation.startswith("hasten") for module in modules.values()):  # type: ignore[union-attr]
            raise UsageError(f"This {type(model).__name__} is accelerated already. Close the other session first.")
        self.layers = 1 + max(int(module.layer_idx) for module in modules.values())  # type: ignore[arg-type]
        self.window_layers = [getattr(module, "sliding_window", None) for module in modules.values()]
        _register()
        try:
            self._attach(modules)
        except BaseException:
            self._attachment.restore()
            raise

    def _attach(self, modules: dict[str, nn.Module]) -> None:
        memo: dict[int, Any] = {}
        copy.deepcopy(self.host.config, memo)
        for module in modules.values():
            if id(module.config) not in memo:
                copy.deepcopy(module.config, memo)
        ours = {id(module.config) for module in modules.values()}
        for module in modules.values():
            self._attachment.replace(module, "forward", Site(self, module).forward(module.forward))
        for module in self.host.modules():
            config = module.__dict__.get("config")
            if isinstance(config, PreTrainedConfig) and id(config) in memo:
                self._attachment.replace(module, "config", memo[id(config)])
        for number in ours:
            memo[number]._attn_implementation_internal = NAME
        base = self.host.base_model
        self._attachment.replace(base, "forward", self._around(base.forward))
        if hasattr(self.host, "_prepare_cache_for_generation"):
            prepare = self._prepare(self.host._prepare_cache_for_generation)
            self._attachment.replace(self.host, "_prepare_cache_for_generation", prepare)

    def _prepare(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` gets our cache where it would have made a `DynamicCache`; other caches are left alone."""

        @functools.wraps(own)
        def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            given = model_kwargs.get("past_key_values")
            found = own(generation_config, model_kwargs, *args, **kwargs)
            made = model_kwargs.get("past_key_values")
            if given is None and type(made) is DynamicCache:
                model_kwargs["past_key_values"] = self.cache()
            elif not isinstance(made, KVCache):
                kind = type(made).__name__ if made is not None else "no cache"
                self.note(f"Generation with {kind} is the model's own: the policy acts on the cache that generate makes by default.")
            return found

        return prepare

    def _around(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The decoder's forward: the padding mask goes to the cache, and the model makes no mask of its own."""
        names = list(inspect.signature(own).parameters)

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            cache = kwargs.get("past_key_values")
            if not isinstance(cache, KVCache):
                return own(**kwargs)
            if cache.session is not self:
                raise UsageError("This cache was made by another session. Caches work with the model that they were made for.")
            return self.call(cache, own, kwargs)

        return forward

    def call(self, cache: KVCache, own: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """One call of the decoder with our cache."""
        tokens = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        batch, n = tokens.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise UsageError(
                f"A cache policy takes padding masks of two dimensions, got {tuple(mask.shape)}. Drafts announce what they read"
                " with cache.draft()."
            )
        valid = None if mask is None else mask[:, -n:].bool()
        now = cache.begin(batch, n, valid, tokens.device)
        # Masks of four dimensions are passed on as they are: this one says nothing, and costs nothing.
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = now.at.clamp(min=0)
        done = False
        try:
            found = own(**kwargs)
            done = True
        finally:
            cache.end(done)
        self._heed_limits(cache)
        return found

    def read(
        self, site: Site, q: Tensor, layer: KVLayer, scale: float | None, window: int | None, extra: dict[str, Any]
    ) -> Tensor:
        """What a layer reads: o [B, N, Hq, Dv]."""
        assert layer.view is not None and layer.cache.now is not None
        return attend(site.module, q, layer.view, layer.cache.now.at, scale, window, extra)

    def _heed_limits(self, cache: KVCache) -> None:
        cap = self.limits.max_cache_bytes
        if cap is not None and cache.bytes > cap:
            self.note(
                f"The cache holds {cache.bytes:,} bytes, above max_cache_bytes = {cap:,}: the policy's amount is too large for it."
            )

    # --- what users ask -------------------------------------------------------------------------------

    def cache(self) -> KVCache:
        """A new cache, for calls of the model that are not `generate`, and for a conversation: pass it as
        `past_key_values` again and again."""
        if self._closed:
            raise UsageError("This session is closed; its caches are, too. Open one with hasten.accelerate(model, recipe).")
        self.last = KVCache(self, self.layers, self.part)
        return self.last

    def report(self) -> KVReport:
        """What the last cache holds, and what left it, layer by layer."""
        return report_of(self)

    def note(self, sentence: str) -> None:
        """Said once, in the report and as a warning."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            warnings.warn(f"hasten: {sentence}", stacklevel=3)

    @property
    def closed(self) -> bool:
        """Has the model been restored?"""
        return self._closed

    def close(self) -> None:
        """Restore the model. Safe to call twice; the report stays."""
        if not self._closed:
            self._closed = True
            self._attachment.restore()
            for sentence in self.report().inert:
                self.note(sentence)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def attach(model: Any, recipe: Recipe | KeptCache, limits: Limits | None = None) -> KVSession:
    """What `hasten.accelerate` does with a causal language model and a recipe whose `kv` is a `KeptCache`."""
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(kv=recipe)
    return KVSession(model, recipe, limits)


def _part(recipe: Recipe) -> KeptCache:
    if not isinstance(recipe.kv, KeptCache):
        kind = recipe.kv.kind if recipe.kv is not None else None
        raise UsageError(f"A causal language model takes kv of kind {KeptCache.kind!r}, got {kind!r}.")
    others = [axis for axis in recipe.axes if axis not in ("kv",)]
    if others:
        raise UsageError(f"This recipe sets {' and '.join(others)} beside kv, which have no seam here. Take a recipe with kv alone.")
    return recipe.kv


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """The registered function. Modules that nobody attached, and other caches, get SDPA."""
    site, cache, hidden, named = kwargs.pop(CALL, (None, None, None, None))
    if site is None or cache is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return site.attend(query, cache, scaling, hidden, named, kwargs), None


def _register() -> None:
    """Name our function in transformers' registries. A name that nobody uses changes nothing for other models."""
    AttentionInterface.register(NAME, torch.compiler.disable(_attention))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(NAME, sdpa_mask)
