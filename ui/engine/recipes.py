"""Recipes as a page sends them: by name, as YAML text, or by the id of a training here. Never by a path.

`trained:ID` is a student that a training here has made, ID that of its output. It stands alone, as a whole recipe, or in YAML as
the `path` of a part, where the part is that of the student.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.errors import RecipeError

if TYPE_CHECKING:
    from hasten.recipe import FromFile, Recipe

TRAINED = re.compile(r"trained:([0-9a-f]{16})")


def check(text: str) -> None:
    """Raise `RecipeError` unless `text` is a recipe. A training's student is looked up when the job runs."""
    if TRAINED.fullmatch(text) is None:
        parsed(text)


def named(text: str) -> str:
    """What to call it in a table."""
    found = TRAINED.fullmatch(text)
    return f"student {found[1][:6]}" if found else parsed(text).name or "custom"


def recipe_of(text: str, trained: Mapping[str, Path] | None = None) -> Recipe:
    """The recipe that `text` is. trained: id -> file of the students' recipes. Raises `RecipeError`."""
    if TRAINED.fullmatch(text):
        return _student(text, trained or {}).model_copy(update={"name": named(text)})
    return _with_files(parsed(text), lambda axis, part: _part_of_student(axis, part, trained or {}))


def portable(recipe: Recipe, trained: Mapping[str, Path]) -> Recipe:
    """The same without paths: what is a student's stands as `trained:ID`, so that a request may have it as YAML."""
    ids = {file.parent.resolve(): name for name, file in trained.items()}

    def renamed(axis: str, part: FromFile) -> FromFile:
        places = (part.place.resolve(), *part.place.resolve().parents)
        found = next((ids[place] for place in places if place in ids), None)
        return part if found is None else part.model_copy(update={"path": f"trained:{found}"})

    return _with_files(recipe, renamed)


def absolute(recipe: Recipe) -> Recipe:
    """The same with whole paths, so that it runs wherever it is written."""
    return _with_files(recipe, lambda axis, part: part if _bundled(part.path) else part.model_copy(update={"path": str(part.place.absolute())}))


def parsed(text: str) -> Recipe:
    """By name or from YAML, students' parts not looked up yet; what would read any other file is refused with `RecipeError`."""
    from hasten.pipelines.recipes import recipe
    from hasten.recipe import FromFile, from_yaml

    if "\n" in text or ": " in text:
        found = from_yaml(text)
    else:
        if "/" in text or "\\" in text or text.endswith((".yaml", ".yml")):
            raise RecipeError(f"{text[:60]!r} is a path. Paste the recipe's YAML text, or give a name of `hasten recipes`.")
        found = recipe(text)
    for axis, part in found.axes.items():
        if isinstance(part, FromFile) and part.path and not TRAINED.fullmatch(part.path) and not _bundled(part.path):
            raise RecipeError(f"{axis}.path names a file, which a request may not. Name a student that comes with hasten, or trained:ID.")
    return found


def _student(text: str, trained: Mapping[str, Path]) -> Recipe:
    from hasten.recipe import read

    found = TRAINED.fullmatch(text)
    if found is None or found[1] not in trained:
        raise RecipeError(f"There is no student {text!r} here. Train one, or name a recipe of `hasten recipes`.")
    return read(trained[found[1]])


def _part_of_student(axis: str, part: FromFile, trained: Mapping[str, Path]) -> FromFile:
    """`part` with the file of the student that its path names; as it is where it names none."""
    from hasten.recipe import FromFile

    if not TRAINED.fullmatch(part.path):
        return part
    theirs = _student(part.path, trained).axes.get(axis)
    if not isinstance(theirs, FromFile):
        raise RecipeError(f"Student {part.path!r} has no file for {axis}. Leave {axis} out, or name another student.")
    return part.model_copy(update={"path": str(theirs.path)}).beside(theirs.place.parent)


def _with_files(recipe: Recipe, change: Callable[[str, FromFile], FromFile]) -> Recipe:
    """`recipe` with each part that reads a file put through `change`."""
    from hasten.recipe import FromFile

    parts = {axis: part for axis, part in recipe.axes.items() if isinstance(part, FromFile) and part.path}
    return recipe.model_copy(update={axis: change(axis, part) for axis, part in parts.items()}) if parts else recipe


def _bundled(path: str) -> bool:
    from hasten.pipelines.lora import BUNDLED

    return re.fullmatch(r"[A-Za-z0-9][\w.-]*", path) is not None and (BUNDLED / path).is_dir()
