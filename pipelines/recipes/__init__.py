"""Recipes: a paper is a typed function that returns a `Recipe`; YAML is its serialised form.

Every public function in this folder's modules that is annotated `-> Recipe` is a recipe and is listed
under its name with dashes. There is no other registry.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hasten.budget import Budget
from hasten.caching.decode.kept import KeptCache
from hasten.errors import RecipeError, nearest
from hasten.pipelines.recipes import (
    attention,
    attention_text,
    blocks,
    decode,
    decode_kv,
    decode_own,
    diffusion,
    modules,
    network,
    resolutions,
    sequences,
    text,
    text_caches,
    text_images,
    text_ours,
    text_revise,
    widths,
)
from hasten.recipe import Recipe, read
from hasten.sparse_attn.text.causal import CausalAttention

MODULES = (
    diffusion, sequences, resolutions, blocks, modules, network, widths, attention, attention_text, text, text_revise, text_caches,
    text_images, text_ours, decode, decode_kv, decode_own,
)  # fmt: skip


TEXT_DIFFUSION = frozenset({"kv", "commit", "revise", "blocks", "verify"})
"""Axes that are about texts written in any order."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the catalogue. summary: first line of the function's docstring. knobs: its parameters."""

    name: str
    paper: str
    summary: str
    recipe: Recipe
    status: str
    knobs: tuple[str, ...]


@functools.cache
def _functions() -> dict[str, Callable[..., Recipe]]:
    """Name -> function, in the order in which they stand in the source."""
    found: dict[str, Callable[..., Recipe]] = {}
    for module in MODULES:
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if own and not name.startswith("_") and function.__annotations__.get("return") in (Recipe, "Recipe"):
                assert name.replace("_", "-") not in found, f"two recipes are called {name}"
                found[name.replace("_", "-")] = function
    return found


@functools.cache
def catalogue() -> list[Entry]:
    """All recipes, in the order in which they stand in the source."""
    entries = []
    for name, function in _functions().items():
        recipe = function().model_copy(update={"name": name})
        lines = inspect.getdoc(function) or ""
        status = "experimental" if "Experimental." in lines else "stable"
        knobs = tuple(f"{p.name}={p.default!r}" for p in inspect.signature(function).parameters.values())
        entries.append(Entry(name, recipe.paper, lines.splitlines()[0], recipe, status, knobs))
    return entries


def names() -> list[str]:
    """Names that `recipe` accepts."""
    return [entry.name for entry in catalogue()]


def acts_on(recipe: Recipe) -> str:
    """The kind of model that `recipe` is made for, in words. Text diffusion has masked language models."""
    if not recipe.axes:
        return "any model"
    if recipe.draft is not None or isinstance(recipe.kv, KeptCache):
        return "language models"
    if not TEXT_DIFFUSION.isdisjoint(recipe.axes):
        return "text diffusion"
    return "language models" if isinstance(recipe.attention, CausalAttention) else "diffusion models"


def recipe(which: str | Path | Recipe | Budget) -> Recipe:
    """The recipe called `which`, or read from a YAML file, or `which` itself if it is one; `auto` within a `Budget`.

    A name may be followed by the function's arguments, `"auto:psnr=35"`, and names may be joined:
    `"easycache:limit=0.1+adaptive-guidance"` is the two recipes' axes together.
    Raises `RecipeError` for an unknown name or argument (naming the nearest) and for an unreadable file.
    """
    if isinstance(which, Recipe):
        return which
    if isinstance(which, Budget):
        return diffusion.auto(latent_error=which.tolerance).model_copy(update={"name": "auto"})
    if not isinstance(which, str | Path):
        raise RecipeError(f"A recipe is a name, a .yaml path, a Recipe or a Budget, got {which!r}. See `hasten recipes`.")
    if isinstance(which, Path) or which.endswith((".yaml", ".yml")) or "/" in which.partition(":")[0]:
        return read(Path(which))
    first, *others = [_named(name) for name in which.split("+")]
    for other in others:
        first = first | other
    return first


def _named(text: str) -> Recipe:
    name, _, arguments = text.strip().partition(":")
    functions, key = _functions(), name.strip().lower().replace("_", "-")
    if key not in functions:
        raise RecipeError(
            f"Unknown recipe {name!r}.{nearest(key, functions)} `hasten recipes` lists all {len(functions)} of them;"
            " a .yaml file is a recipe, too."
        )
    given = dict(_argument(text, functions[key], part) for part in arguments.split(",") if part.strip())
    try:
        made = functions[key](**given)
    except (ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        raise RecipeError(f"{text}: {_reason(error)}. Arguments of {key}: {_knobs(functions[key])}.") from None
    return made.model_copy(update={"name": text.strip() if given else key})


def _argument(text: str, function: Callable[..., Recipe], part: str) -> tuple[str, Any]:
    """One `knob=value` of a recipe's name; the value is read as YAML, so numbers are numbers."""
    knob, equals, value = part.partition("=")
    knob, known = knob.strip(), inspect.signature(function).parameters
    if not equals or knob not in known:
        raise RecipeError(f"{text}: {part.strip()!r} is no argument; allowed: {_knobs(function)}.{nearest(knob, known)}")
    try:
        return knob, yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"{text}: cannot read the value {value!r} of {knob}.") from None


def _knobs(function: Callable[..., Recipe]) -> str:
    return ", ".join(f"{p.name}={p.default!r}" for p in inspect.signature(function).parameters.values()) or "none"


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"])
        return f"{where}: {first['msg']}".removeprefix(": ").replace("Value error, ", "").rstrip(".")
    return str(error).rstrip(".")
