"""The seam to `generate` of transformers' causal language models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hasten.caching.decode.kept import KeptCache
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.limits import Limits
from hasten.pipelines.decode import compat, places
from hasten.pipelines.decode.session import DecodeSession
from hasten.pipelines.decode_kv.session import KVSession
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Goodput
from hasten.samplers.decode.protocols import Drafter, Pace, Verifier
from hasten.samplers.decode.verify_law import Lossless

AXES = frozenset({"draft", "verify", "pace"})

CACHE_AXES = frozenset({"kv", "attention"})
"""What may stand beside drafts where `kv` is a cache policy: drafts are verified against what it keeps."""


def attach(model: Any, recipe: Recipe, limits: Limits | None = None) -> DecodeSession:
    """What `hasten.accelerate` does with a causal language model and a recipe that drafts: its `generate` writes several tokens
    per forward, until the session is closed.

    model: a `PreTrainedModel` that writes with transformers' `generate`, on sdpa or eager attention; only this instance is
    touched. recipe: one with the axes draft, verify (else lossless) and pace (else goodput); and with
    kv of kind `kept` (attention beside it), whose cache then holds the drafts, too.

    Raises `ModelError` where this is no such model, `UsageError` for a recipe with other axes or parts that do not fit
    together, `RefusedError` where drafts cannot be verified on the model, or transformers is too old.
    """
    compat.check_version()
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inside = ": model.get_base_model(), which keeps its adapters" if hasattr(model, "get_base_model") else ""
        raise ModelError(f"{name} is not a transformers model, so there is no generate() to accelerate. Pass the model inside it{inside}.")
    if getattr(model.generate, "__self__", None) is not model or compat.ours(model):
        raise UsageError(f"This {name} is accelerated already: its generate() or its attention is replaced. Close the other session first.")
    reason = compat.why_not(model) or places.why_model(model)
    if reason:
        raise RefusedError(f"Drafts cannot be verified on this {name}: {reason}.")
    drafter, verifier, pace = _parts(recipe)
    if not isinstance(recipe.kv, KeptCache):
        return DecodeSession(model, recipe, drafter, verifier, pace, limits or Limits())
    if drafter.needs and (recipe.kv.prompt is not None or recipe.kv.shared is not None):
        raise UsageError(
            f"{drafter.kind!r} reads the states of every token of the prompt, and this kv reads only some of them. Leave `prompt` and"
            " `shared` out of the kv, or take look-up."
        )
    if recipe.kv.lazy is not None:
        raise UsageError("lazy-llm chooses by each new token what is computed of the text, and drafts are several at once. Take one of them.")
    cache = KVSession(model, Recipe(name=recipe.name, kv=recipe.kv, attention=recipe.attention), limits)
    try:
        return DecodeSession(model, recipe, drafter, verifier, pace, limits or Limits(), cache)
    except BaseException:
        cache.close()
        raise


def _parts(recipe: Recipe) -> tuple[Drafter, Verifier, Pace]:
    name = f"Recipe {recipe.name!r}" if recipe.name else "The recipe"
    allowed = AXES | CACHE_AXES if isinstance(recipe.kv, KeptCache) else AXES
    others = [axis for axis in recipe.axes if axis not in allowed]
    if others:
        raise UsageError(
            f"{name} sets {' and '.join(others)} beside draft, which cannot be joined with it yet. Take one that only drafts;"
            " `hasten recipes` lists the axes of each."
        )
    verify, pace = recipe.verify or Lossless(), recipe.pace or Goodput()
    if not isinstance(recipe.draft, Drafter):
        raise UsageError(f"{name} has no drafter that decodes causal language models.")
    if not isinstance(verify, Verifier):
        raise UsageError(f"{name} verifies with {verify.kind!r}, which is for text diffusion. Take lossless, multi-round or block.")
    if not isinstance(pace, Pace):
        raise UsageError(f"{name} has pace {pace.kind!r}; a causal language model takes goodput, average or steady.")
    if verify.shape == "chain" and recipe.draft.shape == "tree":
        raise UsageError(
            f"{name} drafts trees with {recipe.draft.kind!r}, and {verify.kind!r} judges chains. Let it draft one candidate, or"
            " verify with multi-round."
        )
    return recipe.draft, verify, pace
