"""One attention module of an attached language model: what it reads, in prompts and of caches.

Shapes: B batch, Hq, Hk heads, n new queries, S keys as the cache hands them over, D, Dv head dimensions.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hasten.pipelines.text_mask import Rule
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.segments import plain
from hasten.sparse_attn.text.exact import exact
from hasten.sparse_attn.text.reader import ReaderState
from hasten.step import Step

if TYPE_CHECKING:
    from hasten.pipelines.text_attention import TextSession

CALL = "hasten_call"
"""Keyword that an attached module's forward hands through to our attention function: which site, with which cache."""

DRAFT = 32
"""Up to so many new queries at once are a continuation (one token, a draft); more are a piece of prompt."""

ONCE = Step(1, 3, 0.5)
"""The step that prompts are read at, as far as the policy of a diffusion model's steps is concerned: a middle one."""


@dataclass(slots=True)
class Site:
    """One attention module of an attached model, and its reader's state for each cache that is alive."""

    session: TextSession
    module: nn.Module
    layers: int
    before: str | None
    readers: weakref.WeakKeyDictionary[Any, ReaderState] = field(default_factory=weakref.WeakKeyDictionary)

    @property
    def layer(self) -> int:
        """Number of the module's layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    def forward(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The module's forward, which tells our attention function the site and the cache: no one else does."""

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            cache = next((given for given in (*kwargs.values(), *args) if isinstance(given, Cache)), None)
            return own(*args, **kwargs, **{CALL: (self, cache)})

        return forward

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None,
        cache: Any, extra: dict[str, Any],
    ) -> Any:  # fmt: skip
        """What our attention function returns: o [B, n, Hq, Dv] and no weights. cache: the one it was called with."""
        reason = self._refuses(q, k, mask, extra)
        rule = None if reason else self.session.rule(mask, q, k.shape[2], extra.get("sliding_window"))
        if reason is None and (rule is None or rule.tree is not None and q.shape[2] > DRAFT):
            reason = "its mask is neither causal nor a causal window with padding, nor that of a draft"
        if reason is not None or rule is None:
            self.session.because(reason or "")
            self.session.note(self.layer, "prompt" if q.shape[2] > DRAFT else "cache", None)
            return self.own(q, k, v, mask, scale, extra)
        prompt = rule.tree is None and (rule.offset == 0 and q.shape[2] > 1 or q.shape[2] > DRAFT)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        o = (self._prompt if prompt else self._cache)(q, k, v, rule, scale, cache)
        self.session.note(self.layer, "prompt" if prompt else "cache", *(o[1:] if o else (None,)))
        if o is None:
            return self.own(q, k, v, mask, scale, extra)
        return o[0].transpose(1, 2).contiguous(), None

    def _refuses(self, q: Tensor, k: Tensor, mask: Tensor | None, extra: dict[str, Any]) -> str | None:
        """Why this call is left to the model; None: it is not."""
        if extra.get("dropout"):
            return "it drops out attention weights"
        if torch.is_grad_enabled() and q.requires_grad:
            return "gradients are asked for (use torch.no_grad())"
        if extra.get("output_attentions"):
            return "attention weights are asked for"
        for name in ("softcap", "s_aux", "position_bias", "cache"):
            if extra.get(name) is not None:
                return f"it has {name}"
        causal = extra.get("is_causal")
        if causal is False or causal is None and not getattr(self.module, "is_causal", True) or k.shape[2] < q.shape[2]:
            return "it is not causal self-attention"
        return None

    # --- the two phases ---------------------------------------------------------------------------

    def _prompt(
        self, q: Tensor, k: Tensor, v: Tensor, rule: Rule, scale: float, cache: Any
    ) -> tuple[Tensor, Tensor | float, float] | None:
        policy = self.session.policy
        acts = policy.acts_on(self.layer, self.layers)
        k, v = k[:, :, : rule.end], v[:, :, : rule.end]
        if cache is not None and acts and policy.cache is not None and _fits(rule, cache, self.layer):
            state = policy.cache.start()
            state.prepare(q, k, v, _first(rule, k.device), scale)
            self.readers[cache] = state
        if policy.prompt is None or not acts or q.shape[2] < policy.min_tokens:
            return None
        if not rule.padded:
            return self._sparse(q, k, v, Mask(_left(rule), 0, rule.offset), scale)
        assert rule.first is not None and rule.stop is not None
        o, done, pairs = q.new_zeros(*q.shape[:3], v.shape[-1]), torch.zeros((), device=q.device), 0.0
        for b, (first, stop) in enumerate(zip(rule.first, rule.stop, strict=True)):
            low = max(0, first - rule.offset)
            if first >= stop or low >= q.shape[2]:
                continue
            one = slice(b, b + 1)
            mask = Mask(_left(rule), 0, rule.offset + low - first)
            part = self._sparse(q[one, :, low:], k[one, :, first:stop], v[one, :, first:stop], mask, scale)
            if part is None:
                return None
            o[one, :, low:], done, pairs = part[0], done + part[1], pairs + part[2]
        return o, done, pairs

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor | float, float] | None:
        prompt = self.session.policy.prompt
        assert prompt is not None
        state = prompt.start(self.layer)
        o = state.attend(
            q, k, v, ONCE, plain(q.shape[2]), plain(k.shape[2]), scale,
            lambda: exact(q, k, v, scale, mask).o, mask,
        )  # fmt: skip
        fact = state.facts[-1]
        if fact.density is None:
            return None
        done = fact.density * float(q.shape[0] * q.shape[2] * k.shape[2])
        return o, done, float(q.shape[0] * pairs_of(mask, q.shape[2]))

    def _cache(
        self, q: Tensor, k: Tensor, v: Tensor, rule: Rule, scale: float, cache: Any
    ) -> tuple[Tensor, Tensor | float, float] | None:
        policy = self.session.policy
        if policy.cache is None or not policy.acts_on(self.layer, self.layers) or rule.end < policy.min_tokens:
            return None
        if cache is None:
            self.session.because("its cache is not a transformers `Cache` that the attention module is called with")
            return None
        if not _fits(rule, cache, self.layer):
            return None
        state = self.readers.get(cache)
        if state is None:  # the prompt was read before the session began
            state = self.readers[cache] = policy.cache.start()
        k, v = k[:, :, : rule.end], v[:, :, : rule.end]
        out = state.attend(q, k, v, _first(rule, k.device), scale, rule.tree)
        pairs = float(k.shape[0] * k.shape[1] * k.shape[2])
        return out.o, pairs if state.read is None else state.read, pairs

    # --- the model's own ----------------------------------------------------------------------------

    def own(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, extra: dict[str, Any]
    ) -> Any:
        """The attention that the model had: its eager function where it was eager or nothing else can do it, else
        SDPA."""
        special = any(extra.get(name) is not None for name in ("softcap", "s_aux")) or extra.get("output_attentions")
        if self.before in ("eager", None) or special:
            eager = getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)
            if eager is not None:
                return eager(self.module, q, k, v, _additive(mask, q, k), scaling=scale, **{"dropout": 0.0, **extra})
        return sdpa_attention_forward(self.module, q, k, v, mask, scaling=scale, **extra)


def _fits(rule: Rule, cache: Any, layer: int) -> bool:
    """May a reader act on this cache? Padding only in front, and no window of the model's own: a layer with one
    forgets, so that places change their meaning."""
    behind = rule.stop is not None and any(stop != rule.end for stop in rule.stop)
    sliding = getattr(cache, "is_sliding", None)
    slides = isinstance(sliding, list) and layer < len(sliding) and bool(sliding[layer])
    return rule.window is None and not behind and not slides


def pairs_of(mask: Mask, queries: int) -> int:
    """Pairs of a query and a key that a causal mask allows."""
    most = mask.offset + queries  # keys of the last query
    if mask.left is None or most <= mask.left + 1:
        return (mask.offset + 1 + most) * queries // 2
    growing = max(0, mask.left - mask.offset)  # queries that see less than a whole window
    return (mask.offset + 1 + mask.offset + growing) * growing // 2 + (queries - growing) * (mask.left + 1)


def _first(rule: Rule, device: torch.device) -> Tensor | None:
    return None if rule.first is None else torch.tensor(rule.first, device=device)


def _left(rule: Rule) -> int | None:
    return None if rule.window is None else rule.window - 1


def _additive(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """SDPA's mask as eager attention wants it: 0 and the smallest number of the dtype."""
    if mask is None:
        if q.shape[2] == 1:
            return None
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
