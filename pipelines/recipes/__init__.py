"""Recipes: a paper is a typed function that returns a `Recipe`; YAML is its serialised form.

Every public function in this folder's modules that is annotated `-> Recipe` is a recipe and is listed
under its name with dashes. There is no other registry.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path

from hasten.budget import Budget
from hasten.errors import RecipeError, nearest
from hasten.pipelines.recipes import blocks, diffusion, network
from hasten.recipe import Recipe, read

MODULES = (diffusion, blocks, network)


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
def catalogue() -> list[Entry]:
    """All recipes, in the order in which they stand in the source."""
    entries = []
    for module in MODULES:
        for name, function in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
                continue
            if function.__annotations__.get("return") not in (Recipe, "Recipe"):
                continue
            recipe = function().model_copy(update={"name": name.replace("_", "-")})
            lines = inspect.getdoc(function) or ""
            status = "experimental" if "Experimental." in lines else "stable"
            knobs = tuple(str(p) for p in inspect.signature(function).parameters.values())
            entries.append(Entry(recipe.name, recipe.paper, lines.splitlines()[0], recipe, status, knobs))
    return entries


def names() -> list[str]:
    """Names that `recipe` accepts."""
    return [entry.name for entry in catalogue()]


def recipe(which: str | Path | Recipe | Budget) -> Recipe:
    """The recipe called `which`, or read from a YAML file, or `which` itself if it is one; `auto` within a `Budget`.

    Names may be joined: `"easycache+adaptive-guidance"` is the two recipes' axes together.
    Raises `RecipeError` for an unknown name (naming the nearest) and for an unreadable file.
    """
    if isinstance(which, Recipe):
        return which
    if isinstance(which, Budget):
        return diffusion.auto(which.tolerance).model_copy(update={"name": "auto"})
    if not isinstance(which, str | Path):
        raise RecipeError(f"A recipe is a name, a .yaml path, a Recipe or a Budget, got {which!r}. See `hasten recipes`.")
    if isinstance(which, Path) or which.endswith((".yaml", ".yml")) or "/" in which:
        return read(Path(which))
    first, *others = [_named(name) for name in which.split("+")]
    for other in others:
        first = first | other
    return first


def _named(name: str) -> Recipe:
    known = {entry.name: entry.recipe for entry in catalogue()}
    key = name.strip().lower().replace("_", "-")
    if key not in known:
        raise RecipeError(f"Unknown recipe {name!r}; allowed: {', '.join(known)}, or a .yaml file.{nearest(key, known)}")
    return known[key]
