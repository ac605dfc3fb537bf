"""One attention module of an attached language model: what it reads, in prompts and of caches.

Shapes: B batch, Hq, Hk heads, n new queries, S keys as the cache hands them over, D, Dv head dimensions.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hasten.errors import HastenError
from hasten.pipelines.causal.mask import Rule
from hasten.pipelines.causal.rows import Done
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.segments import plain
from hasten.sparse_attn.text.exact import exact
from hasten.sparse_attn.text.reader import ReaderState
from hasten.step import Step

if TYPE_CHECKING:
    from hasten.pipelines.causal.session import TextSession

CALL = "hasten_call"
"""Keyword that an attached module's forward hands through to our attention function: which site, with which cache."""

DRAFT = 32
"""Up to so many new queries at once are a continuation (one token, a draft); more are a piece of prompt."""

ONCE = Step(1, 3, 0.5)
"""The step that prompts are read at, as far as the policy of a diffusion model's steps is concerned: a middle one."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of attention: q [B, Hq, n, D], k [B, Hk, S, D], v [B, Hk, S, Dv] up to the last key that any query reads.
    cache: the one that the module was called with, where that is a `Cache`."""

    q: Tensor
    k: Tensor
    v: Tensor
    rule: Rule
    scale: float
    cache: Any


@dataclass(slots=True)
class Site:
    """One attention module of an attached model, and its reader's state for each cache that is alive.

    name: dotted, in the model. layers: how many the model has. before: the attention that the module had.
    """

    session: TextSession
    name: str
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
        n, keys = q.shape[2], k.shape[2]
        reason = self._refuses(q, k, mask, extra)
        rule = None if reason else self.session.rule(mask, q, keys, extra.get("sliding_window"))
        if reason is None and (rule is None or rule.tree is not None and n > DRAFT):
            reason = "its mask is neither causal nor a causal window with padding, nor that of a draft"
        if reason is not None or rule is None:
            self.session.because(reason or "")
            rule = Rule(max(0, keys - n), keys)  # counted as if it were causal
            self.session.count(self, "prompt" if n > DRAFT or 1 < n == keys else "cache", None, _pairs(q, rule), keys)
            return self.own(q, k, v, mask, scale, extra)
        call = Call(q, k[:, :, : rule.end], v[:, :, : rule.end], rule, q.shape[-1] ** -0.5 if scale is None else scale, cache)
        prompt = rule.tree is None and (rule.offset == 0 and n > 1 or n > DRAFT)
        if prompt:
            self._tried("cache", self._prepare, call)
        phase = "prompt" if prompt else "cache"
        done = self._tried(phase, self._prompt if prompt else self._cache, call)
        self.session.count(self, phase, done, _pairs(q, rule), rule.end)
        if done is None:
            return self.own(q, k, v, mask, scale, extra)
        return done.o.transpose(1, 2).contiguous(), None

    def _tried(self, phase: str, method: Callable[[Call], Done | None], call: Call) -> Done | None:
        """`method(call)`; whatever goes wrong in it ends in the model's own attention, and is said."""
        if phase in self.session.off or not self.session.policy.acts_on(self.layer, self.layers):
            return None
        try:
            return method(call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a method that fails must not end the user's run
            known = isinstance(error, HastenError)
            self.session.refuse(phase, str(error).rstrip(".") if known else f"it failed ({type(error).__name__}: {error})")
            return None

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

    def _prepare(self, call: Call) -> None:
        """Let the reader of the cache see the prompt."""
        policy, cache = self.session.policy, call.cache
        if policy.cache is None or cache is None or cache in self.session.declined or not _fits(call.rule, cache, self.layer):
            return
        state = policy.cache.start()
        state.prepare(call.q, call.k, call.v, _first(call.rule, call.k.device), call.scale)
        self.readers[cache] = state
        self.session.account(cache)

    def _prompt(self, call: Call) -> Done | None:
        if self.session.policy.prompt is None or call.q.shape[2] < self.session.least("prompt"):
            return None
        q, k, v, rule = call.q, call.k, call.v, call.rule
        if not rule.padded:
            return self._sparse(q, k, v, Mask(_left(rule), 0, rule.offset), call.scale)
        assert rule.first is not None and rule.stop is not None
        o, parts = q.new_zeros(*q.shape[:3], v.shape[-1]), []
        for b, (first, stop) in enumerate(zip(rule.first, rule.stop, strict=True)):
            low = max(0, first - rule.offset)
            if first >= stop or low >= q.shape[2]:
                continue
            one = slice(b, b + 1)
            mask = Mask(_left(rule), 0, rule.offset + low - first)
            part = self._sparse(q[one, :, low:], k[one, :, first:stop], v[one, :, first:stop], mask, call.scale)
            if part is None:
                return None
            o[one, :, low:] = part.o
            parts.append(part)
        recalls = [part.recall for part in parts if part.recall is not None]
        read = sum((part.read for part in parts), start=torch.zeros((), device=q.device))
        return Done(o, read, torch.stack(recalls).mean() if recalls else None)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Done | None:
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
        return Done(o, fact.density * float(math.prod(q.shape[:3]) * k.shape[2]), fact.rho if prompt.tells_recall else None)

    def _cache(self, call: Call) -> Done | None:
        policy, rule, cache = self.session.policy, call.rule, call.cache
        if policy.cache is None or rule.end < self.session.least("cache"):
            return None
        if cache is None:
            self.session.because("its cache is not a transformers `Cache` that the attention module is called with")
            return None
        if cache in self.session.declined or not _fits(rule, cache, self.layer):
            return None
        q, k, v = call.q, call.k, call.v
        state = self.readers.get(cache)
        late = state is None  # the prompt was read before the session began
        if state is None:
            state = self.readers[cache] = policy.cache.start()
        out = state.attend(q, k, v, _first(rule, k.device), call.scale, rule.tree)
        if late:
            self.session.account(cache)
        if state.read is None:
            return Done(out.o, _pairs(q, rule))
        return Done(out.o, state.read * float(q.shape[1] // k.shape[1] * q.shape[2]))

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


def _pairs(q: Tensor, rule: Rule) -> float:
    """Pairs of a query and a key, over all samples and heads, that the model's own attention computes."""
    return float(q.shape[0] * q.shape[1] * pairs_of(Mask(_left(rule), 0, rule.offset), q.shape[2]))


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
