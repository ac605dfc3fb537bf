"""Models and calls whose tokens would not stand where plain decoding puts them: each is a clause, "" where all is well.

Drafts are told their places by `position_ids`, and rows of one batch have theirs at different slots. A model that counts slots
instead, or turns keys differently once a text is long, would read something else without any error.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hasten.pipelines.decode import compat


def why_model(model: Any) -> str:
    """Why drafts have no places on this model."""
    config = model.config.get_text_config(decoder=True)
    missing = [name for name in ("past_key_values", "position_ids") if name not in inspect.signature(type(model).forward).parameters]
    if missing:
        return f"its forward takes no {' and no '.join(missing)}, so drafts cannot be put behind its text"
    if getattr(config, "alibi", False):
        return "its attention goes by the distance of slots (ALiBi), and drafts stand side by side"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "its local attention counts slots, and drafts stand side by side"
    return ""


def why_call(model: Any, ids: Tensor, arguments: dict[str, Any], limit: int | None) -> str:
    """Why the rows of a call cannot be followed. ids int64 [B, P]; arguments: the model's; limit: length of a row at most."""
    if not ids.shape[1]:
        return "its prompt is empty"
    mask, position = arguments.get("attention_mask"), arguments.get("position_ids")
    if any(each is not None and each.shape[-1] != ids.shape[1] for each in (mask, position)):
        return "input_ids leaves out what the cache that it continues has read; pass the whole text"
    here = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    reason = why_mask(model, here)
    if reason:
        return reason
    place = (here.long().cumsum(1) - 1).masked_fill(~here, 0)
    if position is not None and not bool((position == place).all()):
        return "the model counts places in its own way here"
    return _why_length(model, int(place.max()) + 1, ids.shape[1], limit)


def why_mask(model: Any, here: Tensor) -> str:
    """Why texts cannot be followed by the places of their tokens. here: bool [B, P], False for padding."""
    if not bool(here[:, -1].all()):
        return "a row ends in padding; pad on the left"
    slides = "sliding_attention" in compat.layer_kinds(model.config.get_text_config(decoder=True))
    if slides and bool((here[:, :-1] & ~here[:, 1:]).any()):
        return "there is padding inside a text, and its layers have windows"
    return ""


def _why_length(model: Any, real: int, columns: int, limit: int | None) -> str:
    """real: tokens of the longest row, columns: with padding."""
    for kind, most in turning(model):
        if (limit is None or limit > most) and ("dynamic" in kind or min(real, columns) <= most):
            return f"it may become longer than {most:,} tokens, where the model ({kind} positions) turns all keys anew"
    return ""


def turning(model: Any) -> list[tuple[str, int]]:
    """(kind, length) of rotary positions that change once a text is longer."""
    config = model.config.get_text_config(decoder=True)
    given = getattr(config, "rope_parameters", None) or {}
    found = []
    for each in [given, *(value for value in given.values() if isinstance(value, dict))]:
        kind = str(each.get("rope_type", ""))
        if kind == "longrope":
            found.append((kind, int(each.get("original_max_position_embeddings") or config.original_max_position_embeddings)))
        elif "dynamic" in kind:
            found.append((kind, int(config.max_position_embeddings)))
    return found
