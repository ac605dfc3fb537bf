"""Catches the attention of a language model: new keys and values go into our store, and what is read comes from it.

The host never sees a cache of ours: it is called with the tokens to compute and their positions, and its attention layers
are answered by `Tap.attend`. Two ways to get there, both of one instance only: transformers' `AttentionInterface`, and
for models with attention code of their own a mode that catches `scaled_dot_product_attention` underneath the call.

Shapes: m texts, N computed tokens of each, K keys that are read, Hq, Hk heads, D, Dv head dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from hasten.caching.store import KVStore, Pass
from hasten.errors import ModelError, UsageError
from hasten.session import Attachment

NAME = "hasten_canvas"
"""Of our function in transformers' registries of attention functions and of masks."""

Watch = Callable[[int, Tensor, Tensor, Tensor, "Pass"], None]
"""Told of each attention: layer, q [m, Hq, N, D], keys [m, Hk, K, D], values, and the call it belongs to."""


class Tap:
    """What stands between a model's attention layers and the store during one generation.

    now, store: the call under way, and where keys and values are kept. watch: asked after each layer, if set. heads: key
    heads of the model, for hosts that repeat them for their groups of queries before the attention is caught.
    """

    def __init__(self) -> None:
        self.now: Pass | None = None
        self.store: KVStore | None = None
        self.watch: Watch | None = None
        self.heads: int | None = None
        self.calls = 0

    @contextmanager
    def during(self, now: Pass, store: KVStore) -> Iterator[None]:
        """One call of the model."""
        self.now, self.store, self.calls = now, store, 0
        try:
            yield
            store.note(now)
        finally:
            self.now = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attention of the new queries over what the call lets them read: [m, Hq, N, Dv]."""
        assert self.now is not None and self.store is not None
        self.calls += 1
        keys, values = self.store.exchange(layer, k, v, self.now)
        visible = self.now.visible
        mask = visible[:, None] if visible is not None else None
        o = F.scaled_dot_product_attention(
            q, keys.to(q.dtype), values.to(q.dtype), mask, scale=scale, enable_gqa=q.shape[1] != keys.shape[1]
        )
        if self.watch is not None:
            self.watch(layer, q, keys, values, self.now)
        if self.now.depth is not None:
            self.now.depth.watch(layer, q, keys, self.now, q.shape[-1] ** -0.5 if scale is None else scale)
        return o


class CatchSdpa(TorchFunctionMode):
    """For models with attention code of their own: catches `scaled_dot_product_attention`; layers are counted."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap = tap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.tap.now is not None:
            return self._caught(*args, **kwargs)
        return func(*args, **kwargs)

    def _caught(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """attn_mask and is_causal are the host's idea of who sees whom on the tokens it was given; ours counts."""
        tap = self.tap
        assert tap.now is not None
        with torch._C.DisableTorchFunction():
            if tap.heads is not None and key.shape[1] != tap.heads:  # each head stands in a row of its copies
                key, value = (x[:, :: x.shape[1] // tap.heads] for x in (key, value))
            if query.shape[2] == tap.now.slots.shape[1]:
                return tap.attend(tap.calls, query, key, value, scale)
            # transformers hands a single query over with its group of heads where the tokens stand
            o = tap.attend(tap.calls, query.flatten(1, 2)[:, :, None], key, value, scale)
            return o.reshape(*query.shape[:3], -1)


def has_interface(model: nn.Module) -> bool:
    """Does this model's attention go through transformers' `AttentionInterface`?"""
    return isinstance(model, PreTrainedModel) and bool(model._can_set_attn_implementation())


def sites(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of this model that have its config. Raises `ModelError` where no layer could be caught."""
    modules = list(model.modules())
    if not any(isinstance(getattr(module, "layer_idx", None), int) for module in modules):
        raise ModelError(f"{type(model).__name__} has no attention layer with a number.")
    return [module for module in modules if isinstance(module.__dict__.get("config"), PreTrainedConfig)]


def attach(model: PreTrainedModel, tap: Tap, modules: list[nn.Module] | None = None) -> Attachment:
    """Answer the self-attention of this model from `tap` until the attachment is restored.

    Its modules get a copy of their config that names our function and holds the tap; the model that it came from, and
    others of the same config, notice nothing. modules: `sites` of the model, where somebody remembers them, because a
    model with many experts has tens of thousands of others. Raises `ModelError` where no layer would be caught,
    `UsageError` where the model is attached already.
    """
    memo: dict[int, Any] = {}
    modules = sites(model) if modules is None else modules
    for module in modules:
        if module.config._attn_implementation == NAME:  # type: ignore[union-attr]
            raise UsageError(f"This {type(model).__name__} is generating already. Wait, or use another copy of it.")
        if id(module.config) not in memo:
            copy.deepcopy(module.config, memo)
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    attachment = Attachment()
    for module in modules:
        ours = memo[id(module.config)]
        ours._attn_implementation_internal = NAME
        ours.hasten_tap = tap
        attachment.replace(module, "config", ours)
    return attachment


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The registered function."""
    tap: Tap = module.config.hasten_tap  # type: ignore[union-attr, assignment]
    o = tap.attend(int(module.layer_idx), query, key, value, scaling)  # type: ignore[arg-type]
    return o.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers need not build a mask: ours stands in the `Pass`."""
