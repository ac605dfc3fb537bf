"""Models that a cache policy cannot be right on: found when it is attached, before anything is read."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin

from hasten.errors import RefusedError
from hasten.pipelines.decode import compat

SLIDING = ("create_sliding_window_causal_mask", "create_masks_for_generate")
"""What the file of a model calls that has windows in its masks."""


def check(model: Any, modules: Iterable[nn.Module]) -> None:
    """Raise `RefusedError` where a cache of slots, read by place, is not what this model's layers keep or read. modules: its
    attention."""
    reason = _why_not(model, list(modules))
    if reason:
        raise RefusedError(
            f"A cache policy cannot act on this {type(model).__name__}: {reason}. Take a recipe that drafts, such as look-up, or none;"
            " `hasten recipes` says what each acts on."
        )


def decoder_of(model: Any) -> Any:
    """The module that is called with the cache and makes masks: the base model, or where that is a shell around a decoder which
    the model calls itself (OPT), the decoder."""
    base = model.base_model
    inner = getattr(base, "decoder", None)
    return inner if inner is not None and inner is model.get_decoder() else base


def windows(model: Any) -> list[int | None]:
    """Reach of every layer as the model's masks have it, None for all of the text. Some attention modules do not say it."""
    config = model.config.get_text_config(decoder=True)
    reach = getattr(config, "sliding_window", None)
    return [reach if kind == "sliding_attention" else None for kind in compat.layer_kinds(config)]


def _why_not(model: Any, modules: list[nn.Module]) -> str:
    config = model.config.get_text_config(decoder=True)
    others = set(compat.layer_kinds(config)) - compat.LAYERS
    if others:
        return f"its layers of kind {', '.join(sorted(others))} keep or read something else than keys and values by place"
    if model.config.is_encoder_decoder:
        return "it is an encoder with a decoder"
    if "position_ids" not in inspect.signature(decoder_of(model).forward).parameters:
        return "it takes no position_ids, so what is kept cannot be told its places"
    numbers = sorted(int(module.layer_idx) for module in modules)  # type: ignore[arg-type]
    if numbers != list(range(int(config.num_hidden_layers))) or getattr(config, "num_kv_shared_layers", None):
        return "its layers do not have one attention and one part of the cache each"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention caps its logits"
    if any(isinstance(getattr(module, "sinks", None), Tensor) for module in modules):
        return "its attention has sinks with learned logits"
    if any(windows(model)) and not any(hasattr(sys.modules[type(decoder_of(model)).__module__], name) for name in SLIDING):
        return "its windows are in its own cache, and not in its masks"
    own = getattr(type(model), "create_masks_for_generate", None)
    if own is not None and own is not getattr(GenerationMixin, "create_masks_for_generate", None):
        return "its masks are not causal alone (images or prefixes are read in both directions)"
    return ""


def handed_on(given: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor) -> bool:
    """Are these the keys and values that the cache gave, untouched? given: None where they were read already."""
    return given is not None and all(
        ours is theirs or (ours.shape == theirs.shape and bool((ours == theirs).all()))
        for ours, theirs in zip(given, (key, value), strict=True)
    )
