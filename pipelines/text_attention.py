"""The seam to transformers' causal language models: their attention function and what surrounds it.

Shapes: B batch, Hq, Hk heads, n new queries, S keys as the cache hands them over, D, Dv head dimensions.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines.text_mask import Rule, read
from hasten.session import Attachment
from hasten.sparse_attn.causal import CausalAttention
from hasten.sparse_attn.exact import exact
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.reader import ReaderState
from hasten.sparse_attn.segments import plain
from hasten.step import Step

NAME = "hasten"
"""Of our function in transformers' registry of attention functions, and of SDPA's masks in that of masks."""

CALL = "hasten_call"
"""Keyword that an attached module's forward hands through to our attention function: which site, with which cache."""

DRAFT = 32
"""Up to so many new queries at once are a continuation (one token, a draft); more are a piece of prompt."""


ONCE = Step(1, 3, 0.5)
"""The step that prompts are read at, as far as the policy of a diffusion model's steps is concerned: a middle one."""


def attach(model: Any, attention: CausalAttention | SparseAttention) -> TextSession:
    """Let the self-attention of a causal language model read what `attention` says, until the session is closed.

    model: a `PreTrainedModel` whose attention goes through transformers' `AttentionInterface`; only this instance is
    touched (its modules get a copy of the config, which names our function), and closing puts everything back.
    attention: a `SparseAttention` acts on prompts alone. `generate`, batches, padding on either side, sliding
    windows and every kind of cache work as before. Where a call is not plain causal attention (dropout, soft caps,
    sinks with learned logits, masks of another kind, asked-for attention weights, gradients) it is the model's own,
    and the session says why.

    Raises `ModelError` where this is no such model, `UsageError` where it is attached already.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a transformers model. Pass the model, not its pipeline.")
    if not model._can_set_attn_implementation():
        raise RefusedError(
            f"The attention of {type(model).__name__} does not go through transformers' AttentionInterface, so it"
            " cannot be replaced from outside."
        )
    modules = [module for module in model.modules() if _is_site(module)]
    if not modules:
        raise ModelError(f"{type(model).__name__} has no causal self-attention with a layer number.")
    if any(module.config._attn_implementation == NAME for module in modules):
        raise UsageError(f"This {type(model).__name__} is attached already. Close the other session first.")
    _register()
    return TextSession(model, modules, _of_prompts(attention))


@dataclass(slots=True)
class Row:
    """What happened at one layer. phase: "prompt" or "cache". sparse, dense: calls. read, all: over the sparse calls,
    the pairs of a query and a key that were computed (a tensor that nobody has waited for), and that the model's own
    attention computes."""

    layer: int
    phase: str
    sparse: int = 0
    dense: int = 0
    read: Tensor | float = 0.0
    all: float = 0.0

    @property
    def density(self) -> float:
        """Share of the model's pairs that were computed, over the sparse calls; 1 where there were none. What a mask
        forbids within a block is computed, too, and counts. Waits for the device."""
        return min(1.0, float(self.read) / self.all) if self.all else 1.0


class TextSession:
    """An attached model. Use it as a context manager, or call `close()`.

    rows: what happened, by layer and phase. reasons: why calls were left to the model. sites: the attached modules.
    """

    def __init__(self, model: PreTrainedModel, modules: list[nn.Module], policy: CausalAttention) -> None:
        self.policy = policy
        self.rows: dict[tuple[int, str], Row] = {}
        self.reasons: list[str] = []
        self.sites: list[Site] = []
        self._model = type(model).__name__
        self._rules: list[tuple[weakref.ref[Tensor], int | None, Rule | None]] = []
        self._attachment = Attachment()
        layers = 1 + max(int(module.layer_idx) for module in modules)  # type: ignore[arg-type]
        try:
            self._attach(model, modules, layers)
        except BaseException:
            self._attachment.restore()
            raise

    def _attach(self, model: PreTrainedModel, modules: list[nn.Module], layers: int) -> None:
        memo: dict[int, Any] = {}
        copy.deepcopy(model.config, memo)
        for module in modules:
            if id(module.config) not in memo:
                copy.deepcopy(module.config, memo)
        ours = {id(module.config) for module in modules}
        for module in modules:
            site = Site(self, module, layers, module.config._attn_implementation)  # type: ignore[union-attr, arg-type]
            self._attachment.replace(module, "forward", site.forward(module.forward))
            self.sites.append(site)
        for module in model.modules():
            config = module.__dict__.get("config")
            if isinstance(config, PreTrainedConfig) and id(config) in memo:
                self._attachment.replace(module, "config", memo[id(config)])
        for number in ours:
            memo[number]._attn_implementation_internal = NAME

    def close(self) -> None:
        """Put everything back. Warns where nothing was sparse. Safe to call twice."""
        self._attachment.restore()
        calls = sum(row.sparse + row.dense for row in self.rows.values())
        if calls and not any(row.sparse for row in self.rows.values()):
            why = "; ".join(self.reasons) or f"prompts and caches below min_tokens={self.policy.min_tokens}"
            warnings.warn(f"hasten: sparse attention did nothing on {self._model}: {why}.", stacklevel=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rule(self, mask: Tensor | None, query: Tensor, keys: int, window: int | None) -> Rule | None:
        """`read` of this mask, done once for all layers that share it."""
        if mask is None:
            return read(None, query.shape[0], query.shape[2], keys, window)
        for known, its_window, rule in self._rules:
            if known() is mask and its_window == window:
                return rule
        rule = read(mask, query.shape[0], query.shape[2], keys, window)
        self._rules = [entry for entry in self._rules if entry[0]() is not None][-3:]
        self._rules.append((weakref.ref(mask), window, rule))
        return rule

    def note(self, layer: int, phase: str, read_: Tensor | float | None, all_: float = 0.0) -> None:
        """One call at a layer; read_ None: it was dense."""
        row = self.rows.setdefault((layer, phase), Row(layer, phase))
        if read_ is None:
            row.dense += 1
        else:
            row.sparse, row.read, row.all = row.sparse + 1, row.read + read_, row.all + all_

    def because(self, reason: str) -> None:
        """Keep a reason, and say it once."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            warnings.warn(f"hasten: attention of {self._model} is the model's own: {reason}.", stacklevel=3)


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
        return o, done, float(q.shape[0] * _pairs(mask, q.shape[2]))

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


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """The registered function. Modules that nobody attached get SDPA."""
    site, cache = kwargs.pop(CALL, (None, None))
    if site is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return site.attend(query, key, value, attention_mask, scaling, cache, kwargs)


def _register() -> None:
    """Name our function in transformers' registries. A name that nobody uses changes nothing for other models."""
    disabled = torch.compiler.disable(_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(NAME, disabled)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _of_prompts(attention: CausalAttention | SparseAttention) -> CausalAttention:
    """The causal policy, without what its prompt part says about steps of a diffusion model."""
    policy = attention if isinstance(attention, CausalAttention) else CausalAttention(prompt=attention)
    if policy.prompt is None:
        return policy
    still = policy.prompt.model_copy(update={"warm": 0.0, "tail": 0.0, "every": 0, "refresh": 1})
    return policy.model_copy(update={"prompt": still})


def _is_site(module: nn.Module) -> bool:
    """Causal self-attention with a layer number, as transformers writes it."""
    return (
        "Attention" in type(module).__name__
        and any(given.kind is given.VAR_KEYWORD for given in inspect.signature(module.forward).parameters.values())
        and isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False) is True
        and hasattr(getattr(module, "config", None), "_attn_implementation_internal")
    )


def _fits(rule: Rule, cache: Any, layer: int) -> bool:
    """May a reader act on this cache? Padding only in front, and no window of the model's own: a layer with one
    forgets, so that places change their meaning."""
    behind = rule.stop is not None and any(stop != rule.end for stop in rule.stop)
    sliding = getattr(cache, "is_sliding", None)
    slides = isinstance(sliding, list) and layer < len(sliding) and bool(sliding[layer])
    return rule.window is None and not behind and not slides


def _pairs(mask: Mask, queries: int) -> int:
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
