"""The seam to transformers' causal language models: their attention function and what surrounds it.

Shapes: B batch, Hq, Hk heads, n new queries, S keys as the cache hands them over, D, Dv head dimensions.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines.text_mask import Rule, read
from hasten.pipelines.text_site import CALL, Site
from hasten.session import Attachment
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.text.causal import CausalAttention

NAME = "hasten"
"""Of our function in transformers' registry of attention functions, and of SDPA's masks in that of masks."""


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
