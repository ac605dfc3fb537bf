"""A cache policy on one causal language model: attached, at work, taken off."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hasten.caching.decode.kept import KeptCache
from hasten.errors import RefusedError, UsageError
from hasten.limits import Limits
from hasten.pipelines.causal.attention import attention_modules
from hasten.pipelines.causal.configs import redirect, taken
from hasten.pipelines.decode import places
from hasten.pipelines.decode_kv.cache import KVCache
from hasten.pipelines.decode_kv.fits import check, decoder_of, windows
from hasten.pipelines.decode_kv.lazy import LazyLayer
from hasten.pipelines.decode_kv.report import KVReport, report_of
from hasten.pipelines.decode_kv.shared import in_stages
from hasten.pipelines.decode_kv.site import NAME, Chosen, Site, register
from hasten.recipe import Recipe
from hasten.session import Attachment
from hasten.sparse_attn.text.causal import CausalAttention


class KVSession:
    """A context manager: `model.generate(...)` inside it keeps what the policy says; `report()` says what that was.

    Closing puts everything back. caches: those that are alive; the last one is kept for the report.
    """

    def __init__(self, model: Any, recipe: Recipe, limits: Limits | None = None) -> None:
        self.host, self.recipe, self.limits = model, recipe, limits or Limits()
        self.part, self.reader = _part(recipe), _reader(recipe)
        self.last: KVCache | None = None
        self.notes: list[str] = []
        self._attachment = Attachment()
        self._closed = False
        modules = attention_modules(model)
        if taken(modules.values()):
            raise UsageError(f"This {type(model).__name__} is accelerated already. Close the other session first.")
        check(model, modules.values())
        self.windows = windows(model)
        self.layers = 1 + max(int(module.layer_idx) for module in modules.values())  # type: ignore[arg-type]
        self.deciding = -1 if self.part.prompt is None else self.part.prompt.at(self.layers)
        if self.part.shared is not None and any(_slides(module.config) for module in modules.values()):
            raise RefusedError(
                f"{type(model).__name__} has layers with a sliding window, in which a shared prefix goes out of sight row by row."
                " Leave `shared` out of the recipe."
            )
        if self.part.lazy is not None:
            self._heed_lazy(modules)
        register()
        try:
            self._attach(modules)
        except BaseException:
            self._attachment.restore()
            raise

    def _heed_lazy(self, modules: dict[str, nn.Module]) -> None:
        if any(_slides(module.config) for module in modules.values()):
            raise RefusedError(
                f"{type(self.host).__name__} has layers with a sliding window, which drop what lazy-llm would compute later. Leave"
                " `lazy` out of the recipe."
            )
        apart = [place for place in modules if not isinstance(self.host.get_submodule(_above(_above(place))), nn.ModuleList)]
        shared: int = getattr(self.host.config, "num_kv_shared_layers", 0)
        if apart or shared:
            raise RefusedError(
                f"The layers of {type(self.host).__name__} are not a list of attention and what follows it, each with keys of its own,"
                " so that lazy-llm has no place to leave tokens out. Leave `lazy` out of the recipe."
            )
        if self.reader is not None:
            raise UsageError("lazy-llm chooses what each layer reads, and so does the recipe's attention. Take one of them.")

    def _attach(self, modules: dict[str, nn.Module]) -> None:
        for module in modules.values():
            self._attachment.replace(module, "forward", Site(self, module).forward(module.forward))
        if self.part.lazy is not None:
            layers = {int(module.layer_idx): self.host.get_submodule(_above(place)) for place, module in modules.items()}  # type: ignore[arg-type]
            for number, layer in layers.items():
                self._attachment.replace(layer, "forward", LazyLayer(number, min(layers), max(layers)).forward(layer.forward))
        redirect(self._attachment, self.host, modules.values(), NAME)
        base = decoder_of(self.host)
        self._attachment.replace(base, "forward", self._around(base.forward))
        if hasattr(self.host, "_prepare_cache_for_generation"):
            own: Any = self.host._prepare_cache_for_generation
            prepare = self._prepare(own)
            self._attachment.replace(self.host, "_prepare_cache_for_generation", prepare)

    def _prepare(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` gets our cache where it would have made a `DynamicCache`; other caches are left alone."""

        @functools.wraps(own)
        def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            given = model_kwargs.get("past_key_values")
            found = own(generation_config, model_kwargs, *args, **kwargs)
            made = model_kwargs.get("past_key_values")
            mask = model_kwargs.get("attention_mask")
            if mask is not None and mask.dim() == 2 and (reason := places.why_mask(self.host, mask.bool())):
                self.note(f"Generation is the model's own here: {reason}.")
            elif given is None and type(made) is DynamicCache:
                cache = model_kwargs["past_key_values"] = self.cache()
                cache.from_generate = True
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
        n = tokens.shape[1]
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise UsageError(
                f"A cache policy takes padding masks of two dimensions, got {tuple(mask.shape)}. Drafts announce what they read"
                " with cache.draft()."
            )
        valid = None if mask is None else mask[:, -n:].bool()
        if cache.from_generate and not cache.lengths and kwargs.get("input_ids") is not None:
            if self.part.shared is not None:
                return self._shared(cache, own, kwargs, valid)
            if self.part.prompt is not None and n > 1:
                return self._filtered(cache, own, kwargs, valid)
        return self._once(cache, own, kwargs, valid)

    def _once(self, cache: KVCache, own: Callable[..., Any], kwargs: dict[str, Any], valid: Tensor | None) -> Any:
        """One call; valid: bool [B, n], False where there is padding."""
        tokens = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        now = cache.begin(tokens.shape[0], tokens.shape[1], valid, tokens.device)
        # Masks of four dimensions are passed on as they are: this one says nothing, and costs nothing.
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        if kwargs.get("position_ids") is None or cache.repacked:
            kwargs["position_ids"] = now.at.clamp(min=0)
        done = False
        try:
            found = own(**kwargs)
            done = True
        finally:
            cache.end(done)
        self._heed_limits(cache)
        return found

    def _shared(self, cache: KVCache, own: Callable[..., Any], kwargs: dict[str, Any], valid: Tensor | None) -> Any:
        """A prompt of several rows: what they share is computed and held once. The output is that of each row's rest."""
        assert self.part.shared is not None
        columns = kwargs["input_ids"].shape[1]
        stages = in_stages(kwargs["input_ids"], valid, self.part.shared.least)
        for stage in stages[:-1]:
            self._once(cache, own, {**kwargs, "input_ids": stage.ids, "position_ids": None}, stage.valid)
            cache.share(stage.times)
        last = stages[-1]
        found = self._once(cache, own, {**kwargs, "input_ids": last.ids, "position_ids": None}, last.valid)
        cache.columns = columns
        return found

    def _filtered(self, cache: KVCache, own: Callable[..., Any], kwargs: dict[str, Any], valid: Tensor | None) -> Any:
        """A prompt: its first layers choose tokens, and the whole model reads these. The output is theirs."""
        assert self.part.prompt is not None
        ids, first = kwargs["input_ids"], KVCache(self, self.layers, KeptCache())
        first.choosing = True
        try:
            self._once(first, own, {**kwargs, "past_key_values": first}, valid)
            raise AssertionError("the layer that decides was not reached")
        except Chosen as seen:
            real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
            place = (real.cumsum(1) - 1).masked_fill(~real, -1)
            mask = self.part.prompt.choose(seen.q, seen.k, place, place, real.sum(1).tolist(), seen.scale)
        width = int(mask.sum(1).max())
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, ids.shape[1] - width :]
        cache.repacked = True
        found = self._once(cache, own, {**kwargs, "input_ids": ids.gather(1, order)}, mask.gather(1, order))
        cache.columns, cache.unread = ids.shape[1], (real & ~mask).sum(1).tolist()
        return found

    def _heed_limits(self, cache: KVCache) -> None:
        cap = self.limits.max_cache_bytes
        if cap is not None and cache.bytes > cap:
            self.note(
                f"The cache holds {cache.bytes:,} bytes, above max_cache_bytes = {cap:,}: the policy's amount is too large for it."
            )

    # --- what users ask -------------------------------------------------------------------------------

    def cache(self, last: bool = False) -> KVCache:
        """A new cache, for calls of the model that are not `generate`, and for a conversation: pass it as
        `past_key_values` again and again. last: only the logits of each call's last token are wanted, as by `generate`; it may
        give these alone."""
        if self._closed:
            raise UsageError("This session is closed; its caches are, too. Open one with hasten.accelerate(model, recipe).")
        self.last = KVCache(self, self.layers, self.part)
        self.last.from_generate = last
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
    def forgets(self) -> str:
        """What of the texts is not kept or not read as it was, in words; "" for a cache that holds and reads everything."""
        part = self.part
        named = {
            "drops tokens": part.amount is not None, "rounds what it holds": part.codec is not None,
            "reads a part of the prompt": part.prompt is not None, "computes a part of the text in deeper layers": part.lazy is not None,
            "reads a part of what it holds": self.reader is not None,
        }  # fmt: skip
        return " and ".join(name for name, is_so in named.items() if is_so)

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


def _above(place: str) -> str:
    """The module that holds this one, by their dotted names."""
    return place.rpartition(".")[0]


def _slides(config: Any) -> bool:
    """Do any of the model's layers forget what is out of a window?"""
    kinds = getattr(config, "layer_types", None)
    return bool(getattr(config, "sliding_window", None)) and (kinds is None or "sliding_attention" in kinds)


def _part(recipe: Recipe) -> KeptCache:
    if not isinstance(recipe.kv, KeptCache):
        kind = recipe.kv.kind if recipe.kv is not None else None
        raise UsageError(f"A causal language model takes kv of kind {KeptCache.kind!r}, got {kind!r}.")
    others = [axis for axis in recipe.axes if axis not in ("kv", "attention")]
    if others:
        raise UsageError(f"This recipe sets {' and '.join(others)} beside kv, which have no seam here. Take a recipe with kv alone.")
    return recipe.kv


def _reader(recipe: Recipe) -> CausalAttention | None:
    """What the recipe reads of what is kept; None: everything."""
    if recipe.attention is None:
        return None
    if not isinstance(recipe.attention, CausalAttention) or recipe.attention.prompt is not None or recipe.attention.cache is None:
        raise UsageError(
            "Beside a cache policy, attention may say what new tokens read of the cache (a `causal` part with `cache` alone, as"
            " token-select has); this recipe's says something else."
        )
    return recipe.attention
