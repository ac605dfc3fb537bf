"""The seam to transformers' causal language models: their attention function and what surrounds it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hasten.errors import ModelError, RefusedError, UsageError
from hasten.limits import Limits
from hasten.pipelines.causal.configs import taken
from hasten.pipelines.causal.session import NAME, TextSession
from hasten.pipelines.causal.site import CALL
from hasten.pipelines.causal.trial import why_not
from hasten.recipe import Attention, Recipe
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.text.causal import CausalAttention


def attach(model: Any, recipe: Recipe | Attention, limits: Limits | None = None) -> TextSession:
    """What `hasten.accelerate` does with a causal language model: its self-attention reads what `recipe` says, until the
    session is closed.

    model: a `PreTrainedModel` whose attention goes through transformers' `AttentionInterface`; only this instance is
    touched (its modules get a copy of the config, which names our function), and closing puts everything back.
    recipe: one with no axis but `attention`, or the part on that axis; without it everything is only watched. A
    `SparseAttention`, which is made for diffusion models, acts on prompts alone, where it can read them rightly.
    limits: `max_cache_bytes` caps what readers hold beside the model's cache.

    `generate`, batches, padding on either side, sliding windows and every kind of cache work as before. Where a call is
    not plain causal attention (dropout, soft caps, sinks with learned logits, masks of another kind, asked-for attention
    weights, gradients) it is the model's own, and the session says why.

    Raises `ModelError` where this is no such model, `UsageError` for a recipe with other axes and where the model is
    attached already, `RefusedError` where its attention cannot be replaced, or the recipe cannot read a prompt.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(attention=recipe)
    modules = attention_modules(model)
    policy = _policy(recipe, type(model).__name__)
    if taken(modules.values()):
        raise UsageError(
            f"This {type(model).__name__} is accelerated already, and one attention has one recipe. Close the other session"
            " first."
        )
    _register()
    return TextSession(model, modules, recipe, policy, limits or Limits())


def attention_modules(model: Any) -> dict[str, nn.Module]:
    """Dotted name -> attention module. Raises where there is nothing that can be replaced."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inner = next((path for path in ("model", "base_model.model") if _is_inside(model, path)), None)
        raise ModelError(f"{name} is not a transformers model. Pass the model{f' inside it, its .{inner}' if inner else ''}.")
    if not model._can_set_attn_implementation():
        raise RefusedError(
            f"The attention of {name} does not go through transformers' AttentionInterface, so it cannot be replaced from"
            " outside. Take a model whose class does; most that were written since 2024 do."
        )
    modules = {place: module for place, module in model.named_modules() if _is_site(module)}
    if not modules:
        raise ModelError(
            f"{name} has no causal self-attention with a layer number, so recipes for language models have nothing to act on."
        )
    return modules


def _is_inside(host: Any, path: str) -> bool:
    for name in path.split("."):
        host = getattr(host, name, None)
    return isinstance(host, PreTrainedModel)


def _policy(recipe: Recipe, model: str) -> CausalAttention:
    """What the recipe comes to on a language model."""
    name = f"Recipe {recipe.name!r}" if recipe.name else "The recipe"
    others = [axis for axis in recipe.axes if axis != "attention"]
    if others:
        raise UsageError(
            f"{name} sets {' and '.join(others)}, which {'have' if len(others) > 1 else 'has'} no seam on a language model"
            f" ({model}); there accelerate acts on attention alone. Take a recipe with nothing else, such as minference or hip;"
            " `hasten recipes` says what each acts on."
        )
    attention = recipe.attention
    if attention is None:
        return CausalAttention()
    if not isinstance(attention, CausalAttention | SparseAttention):
        raise UsageError(
            f"{name} has attention of kind {attention.kind!r}; a language model takes {CausalAttention.kind!r} or"
            f" {SparseAttention.kind!r}."
        )
    policy = attention if isinstance(attention, CausalAttention) else CausalAttention(prompt=attention)
    if policy.prompt is None:
        return policy
    reason = why_not(policy.prompt)
    if reason:
        raise RefusedError(
            f"{name} cannot read the prompt of a language model ({model}): {reason}. Take one made for language models, such"
            " as minference or hip; `hasten recipes` says what each acts on."
        )
    # What is said about the steps of a diffusion model has no meaning here.
    still = policy.prompt.model_copy(update={"warm": 0.0, "tail": 0.0, "every": 0, "refresh": 1})
    return policy.model_copy(update={"prompt": still})


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


def _is_site(module: nn.Module) -> bool:
    """Causal self-attention with a layer number, as transformers writes it."""
    return (
        "Attention" in type(module).__name__
        and any(given.kind is given.VAR_KEYWORD for given in inspect.signature(module.forward).parameters.values())
        and isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False) is True
        and hasattr(getattr(module, "config", None), "_attn_implementation_internal")
    )
