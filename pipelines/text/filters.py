"""Trained commit filters of a model: found in its folder, and refused where they are another model's."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hasten.errors import RefusedError, UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.text_models.stamp import same, stamp
from hasten.recipe import Recipe
from hasten.samplers.commit import CommitRule, Either, Unmask
from hasten.samplers.filter import Form, Learned, LearnedBlock, load

FILES: dict[Form, str] = {"slots": "filter-slots.safetensors", "block": "filter-block.safetensors"}
"""What a model's own filters are called in its folder."""


def own_filters(recipe: Recipe, model: nn.Module) -> Recipe:
    """`recipe`, with the model's own filter in every rule that wants one and names none.

    Raises `UsageError` where there is none or a file is no filter, `RefusedError` for one that was trained for another
    model: what it learned of one model's confidence says nothing of another's.
    """
    commit = recipe.commit
    if not isinstance(commit, Unmask) or not any(isinstance(rule, Learned | LearnedBlock) for rule in commit.rules):
        return recipe
    return recipe.model_copy(update={"commit": commit.model_copy(update={"rule": _told(commit.rule, model)})})


def _told(rule: CommitRule, model: nn.Module) -> CommitRule:
    if isinstance(rule, Either):
        return Either(rules=tuple(_told(each, model) for each in rule.rules))
    if not isinstance(rule, Learned | LearnedBlock):
        return rule
    file = rule.weights or str(_own(rule, model))
    found = load(file, rule.form)
    if found.stamp is None or not same(found.stamp, stamp(model)):
        says = "does not say which model it was trained for" if found.stamp is None else "was trained for another model"
        raise RefusedError(f"The filter {file} {says} ({type(model).__name__} is used). {_next(rule.form, model)}")
    return rule.model_copy(update={"weights": file})


def _own(rule: Learned | LearnedBlock, model: nn.Module) -> Path:
    folder = _folder(model)
    if folder is not None and (folder / FILES[rule.form]).is_file():
        return folder / FILES[rule.form]
    where = f"its folder has no {FILES[rule.form]}" if folder is not None else "it was not loaded from a folder"
    raise UsageError(
        f"The commit rule {rule.kind!r} needs a filter that was trained for this model, and {where}. {_next(rule.form, model)}"
    )


def _next(form: Form, model: nn.Module) -> str:
    """What to do about it."""
    folder = _folder(model)
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or "MODEL"
    if folder is not None and folder.name not in tiny_models.names():
        return f"Train one in a few minutes: hasten train filter --model {name} --form {form} --out {folder / FILES[form]}"
    return (
        f"Train one in a few minutes: hasten train filter --model {name if folder is None else folder.name} --form {form}"
        f" --out {FILES[form]}, and name that file as the recipe's weights."
    )


def _folder(model: nn.Module) -> Path | None:
    """Where the model was loaded from, if that is a folder."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return Path(name) if name and Path(name).is_dir() else None
