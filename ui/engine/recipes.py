"""Recipes as a page sends them: by name, as YAML text, or by the id of a training here. Never by a path.

`trained:ID` is a student that a training here has made, ID that of its output. It stands alone, as a whole recipe, or in YAML as
the `path` of a part, where the part is that of the student. The `model` of a drafter is a bundled one, or `folder:NAME` below the
models folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.errors import RecipeError, nearest

if TYPE_CHECKING:
    from hasten.part import Part
    from hasten.recipe import FromFile, Recipe

TRAINED = re.compile(r"trained:([0-9a-f]{16})")
FOLDER = "folder:"
MOST = 4096
"""No whole number of a drafter may be larger: its trees stand in memory, and are grown between two looks at the Stop button."""


def check(text: str) -> None:
    """Raise `RecipeError` unless `text` is a recipe. A training's student is looked up when the job runs."""
    if TRAINED.fullmatch(text) is None:
        parsed(text)


def named(text: str) -> str:
    """What to call it in a table."""
    found = TRAINED.fullmatch(text)
    return f"student {found[1][:6]}" if found else parsed(text).name or "custom"


def recipe_of(text: str, trained: Mapping[str, Path] | None = None, folders: Mapping[str, Path] | None = None) -> Recipe:
    """The recipe that `text` is. trained: id -> file of the students' recipes. folders: id -> folder of a model that a drafter may
    be; None leaves its id. Raises `RecipeError`."""
    if TRAINED.fullmatch(text):
        return _student(text, trained or {}).model_copy(update={"name": named(text)})
    found = _with_files(parsed(text), lambda axis, part: _part_of_student(axis, part, trained or {}))
    if found.draft is None or folders is None:
        return found
    return found.model_copy(update={"draft": _with_models(found.draft, folders)})


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
    for where, inner in _inner("draft", found.draft):
        _check_drafter(where, inner)
    return found


def _check_drafter(where: str, part: Part) -> None:
    """Raise `RecipeError` for a drafter, or a part inside one, that would read a file that nobody named by an id, or be too large."""
    from hasten.pipelines import tiny_models
    from hasten.recipe import FromFile

    if isinstance(part, FromFile) and "." in where:
        raise RecipeError(f"{where}.path names a file, which a request may not. Name the student as a whole: trained:ID.")
    for key in type(part).model_fields:
        value = getattr(part, key)
        if key == "model" and value not in tiny_models.names() and not str(value).startswith(FOLDER):
            raise RecipeError(f"{where}.model is {str(value)[:60]!r}; allowed: a bundled model, or folder:NAME of one in your models folder.")
        if isinstance(value, int) and value > MOST:
            raise RecipeError(f"{where}.{key} is {value:,}; allowed here: at most {MOST:,}.")


def _inner(where: str, part: object) -> Iterator[tuple[str, Part]]:
    """`part` and all parts inside it, each with its dotted key."""
    from hasten.part import Part

    if isinstance(part, Part):
        yield where, part
        for key in type(part).model_fields:
            yield from _inner(f"{where}.{key}", getattr(part, key))


def _with_models(part: Part, folders: Mapping[str, Path]) -> Part:
    """`part` with the folders of the models that it and the parts inside it name by id."""
    from hasten.part import Part

    changed: dict[str, object] = {}
    for key in type(part).model_fields:
        value = getattr(part, key)
        if isinstance(value, Part):
            changed[key] = _with_models(value, folders)
        elif key == "model" and str(value).startswith(FOLDER):
            if value not in folders:
                raise RecipeError(f"There is no model {value!r} to draft with. Put its folder into the models folder.{nearest(value, folders)}")
            changed[key] = str(folders[value])
    return part.model_copy(update=changed)


def _student(text: str, trained: Mapping[str, Path]) -> Recipe:
    from hasten.recipe import read

    found = TRAINED.fullmatch(text)
    if found is None or found[1] not in trained:
        raise RecipeError(f"There is no student {text!r} here. Train one, or name a recipe of `hasten recipes`.")
    return read(trained[found[1]])


def _part_of_student(axis: str, part: FromFile, trained: Mapping[str, Path]) -> FromFile:
    """`part` with the file of the student that its path names; as it is where it names none."""
    from hasten.recipe import FromFile

    if not (found := TRAINED.fullmatch(part.path)):
        return part
    theirs = _student(part.path, trained).axes.get(axis)
    if not isinstance(theirs, FromFile):
        raise RecipeError(f"Student {part.path!r} has no file for {axis}. Leave {axis} out, or name another student.")
    return part.model_copy(update={"path": str(theirs.path)}).beside(trained[found[1]].parent)


def _with_files(recipe: Recipe, change: Callable[[str, FromFile], FromFile]) -> Recipe:
    """`recipe` with each part that reads a file put through `change`."""
    from hasten.recipe import FromFile

    parts = {axis: part for axis, part in recipe.axes.items() if isinstance(part, FromFile) and part.path}
    return recipe.model_copy(update={axis: change(axis, part) for axis, part in parts.items()}) if parts else recipe


def _bundled(path: str) -> bool:
    from hasten.pipelines.lora import BUNDLED

    return re.fullmatch(r"[A-Za-z0-9][\w.-]*", path) is not None and (BUNDLED / path).is_dir()
