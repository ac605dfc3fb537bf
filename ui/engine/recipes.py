"""Recipes as a page sends them: by name, as YAML text, or by the id of a training here. Never by a path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.errors import RecipeError

if TYPE_CHECKING:
    from hasten.recipe import Recipe

TRAINED = re.compile(r"trained:([0-9a-f]{16})")
"""A student that a training here has made: the id of its output."""


def check(text: str) -> None:
    """Raise `RecipeError` unless `text` is a recipe. A training's student is looked up when the job runs."""
    if TRAINED.fullmatch(text) is None:
        _plain(text)


def named(text: str) -> str:
    """What to call it in a table."""
    return text if TRAINED.fullmatch(text) else _plain(text).name or "custom"


def recipe_of(text: str, trained: dict[str, Path] | None = None) -> Recipe:
    """The recipe that `text` is. trained: id -> file of the students' recipes. Raises `RecipeError`."""
    found = TRAINED.fullmatch(text)
    if found is None:
        return _plain(text)
    if found[1] not in (trained or {}):
        raise RecipeError(f"There is no student {text!r} here. Train one, or name a recipe of `hasten recipes`.")
    from hasten.recipe import read

    return read((trained or {})[found[1]]).model_copy(update={"name": text})


def _plain(text: str) -> Recipe:
    """By name or from YAML; what would read a file is refused."""
    from hasten.pipelines.recipes import recipe
    from hasten.recipe import FromFile, from_yaml

    if "\n" in text or ": " in text:
        found = from_yaml(text)
    else:
        if "/" in text or "\\" in text or text.endswith((".yaml", ".yml")):
            raise RecipeError(f"{text[:60]!r} is a path. Paste the recipe's YAML text, or give a name of `hasten recipes`.")
        found = recipe(text)
    for axis, part in found.axes.items():
        if isinstance(part, FromFile) and part.path and not _bundled(part.path):
            raise RecipeError(f"{axis}.path names a file, which a request may not. Name a student that comes with hasten, or trained:ID.")
    return found


def _bundled(path: str) -> bool:
    from hasten.pipelines.lora import BUNDLED

    return re.fullmatch(r"[A-Za-z0-9][\w.-]*", path) is not None and (BUNDLED / path).is_dir()
