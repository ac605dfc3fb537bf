"""Tuned recipes that are kept, so that a `Budget` finds them again: on the same weights, scheduler and hardware.

They lie in the folder `tuned` of `HASTEN_HOME`, or of the user's cache folder where that is not set. Deleting them costs
nothing but the tuning.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hasten.atomic import atomic_write
from hasten.budget import Budget
from hasten.errors import HastenError, OutputError, RecipeError, UsageError
from hasten.pipelines.lora import find
from hasten.pipelines.tune.fingerprint import known_by
from hasten.pipelines.tune.goal import Goal
from hasten.recipe import Recipe, read
from hasten.stamp import Stamp

HOME = "HASTEN_HOME"
NEEDED = 0.95
"""Share of held-out runs that must have kept the budget: `verify.NEEDED`, which is not imported, for it takes a second."""

NAMED = 3
"""Files that a sentence about what was left alone names."""

SAME = ("weights", "scheduler", "hardware")
"""What of a stamp must be as it is here. Steps and size are known when a call begins: `matching` asks for them then."""


@dataclass(frozen=True, slots=True)
class Found:
    """ready: the recipes that fit, fastest first. told: which is the first, and what it was measured at; or that there is none.

    skipped: one sentence about files that are no tuned recipes, "" where there are none."""

    ready: tuple[Recipe, ...]
    told: str
    skipped: str = ""

    @property
    def recipe(self) -> Recipe | None:
        """The fastest; None where none fits."""
        return self.ready[0] if self.ready else None


def folder() -> Path:
    """Where tuned recipes are kept. Raises `OutputError` where the system names no home folder and `HASTEN_HOME` none either."""
    try:
        return _home() / "tuned"
    except RuntimeError:
        raise OutputError(f"There is no home folder here. Set {HOME} to a folder in which tuned recipes may be kept.") from None


def keep(recipe: Recipe) -> Path:
    """Put a copy of a tuned recipe where a `Budget` finds it; returns its path. One of an earlier tuning of the same thing (host,
    size, steps and budget) is replaced.

    Raises `UsageError` for a recipe without a stamp, `OutputError` where the folder cannot be written.
    """
    if recipe.tuned is None:
        raise UsageError(f"Recipe {recipe.name!r} has no stamp, so nobody knows where it holds. Keep what hasten tune returns.")
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the folder {place}: {error.strerror}. Set {HOME} to one that can be written.") from None
    return atomic_write(place / _name(recipe.tuned), _found_anywhere(recipe).to_yaml())


def keep_for_budgets(recipe: Recipe) -> str:
    """`keep` it, and say what became of that. A folder that cannot be written must not cost the result of a search."""
    try:
        keep(recipe)
        return "It is kept, so that hasten.Budget finds it on this host."
    except OutputError as error:
        return f"It is not kept for budgets: {error}"


def fitting(models: dict[str, nn.Module], scheduler: Any, budget: Budget) -> Found:
    """The kept recipes that were measured on these networks, scheduler and hardware, within a budget of the same measure
    that is at least as strict. Reads the weights only where anything is kept."""
    files = files_kept()
    if not files:
        return Found((), "no tuned recipe is kept here, so the online controller is at work (hasten tune makes one)")
    here = known_by(models) | {"scheduler": type(scheduler).__name__}
    reading = read_kept(files, here["weights"])
    goal = Goal.read(budget)
    ready = [recipe for recipe in reading.recipes if recipe.tuned is not None and _fits(recipe.tuned, here, goal)]
    if not ready:
        told = f"none of the tuned recipes kept here is for this host and {goal}, so the online controller is at work"
        return Found((), told, reading.skipped)
    ready.sort(key=lambda recipe: (recipe.tuned.speedup or 0.0) if recipe.tuned else 0.0, reverse=True)
    return Found(tuple(ready), told_of(ready[0]), reading.skipped)


def files_kept() -> list[Path]:
    """All that is kept; nothing where there is no folder."""
    try:
        return sorted(folder().glob("*.yaml"))
    except (OSError, OutputError):
        return []


@dataclass(slots=True)
class Reading:
    """recipes: those of the wanted weights. others: file name -> why it is no tuned recipe."""

    recipes: list[Recipe] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def skipped(self) -> str:
        if not self.others:
            return ""
        named = "; ".join(f"{name}: {why}" for name, why in list(self.others.items())[:NAMED])
        more = f"; and {len(self.others) - NAMED} more" if len(self.others) > NAMED else ""
        return f"Of the tuned recipes in {folder()}, {len(self.others)} cannot be used ({named}{more}). Remove them."


def read_kept(files: list[Path], weights: str) -> Reading:
    """Recipes of these weights. Files of other weights are told by their names and not opened."""
    found = Reading()
    for file in files:
        head, dash, _ = file.stem.partition("-")
        if dash and len(head) == len(weights) and set(head) <= set("0123456789abcdef") and head != weights:
            continue
        try:
            recipe = read(file)
        except RecipeError as error:
            found.others[file.name] = str(error).removeprefix(f"{file}: ").rstrip(".")[:160]
            continue
        if recipe.tuned is None:
            found.others[file.name] = "it has no stamp"
        else:
            found.recipes.append(recipe)
    return found


def _fits(stamp: Stamp, here: dict[str, Any], wanted: Goal) -> bool:
    if any(getattr(stamp, name) != here[name] for name in SAME) or (stamp.kept or 0.0) < NEEDED or stamp.speedup is None:
        return False
    try:
        measured = Goal.read(stamp.budget)
    except HastenError:  # of texts, or of a measure that is not known yet
        return False
    return measured.measure == wanted.measure and measured.better(measured.limit) >= wanted.better(wanted.limit)


def told_of(recipe: Recipe) -> str:
    """What a kept recipe is and what it was measured at, in words."""
    stamp = recipe.tuned
    assert stamp is not None
    worst = "" if stamp.worst is None else f"{_worst(stamp)} on "
    return (
        f"a tuned recipe, {', '.join(recipe.axes) or 'nothing changed'}; tuned for {stamp.budget} on {stamp.date or 'an unknown day'},"
        f" {stamp.speedup:.3g}x, {worst}{stamp.prompts} held-out prompts"
    )


def _worst(stamp: Stamp) -> str:
    """For texts the low end of the interval in which the share lies."""
    assert stamp.worst is not None
    if stamp.budget.startswith("exact_match"):
        return f"{stamp.kept or 0.0:.1%} of the texts kept ({stamp.worst:.1%} at least)"
    return f"worst {Goal.read(stamp.budget).told(stamp.worst)}"


def _home() -> Path:
    """`HASTEN_HOME`, or hasten's part of the user's cache folder."""
    if given := os.environ.get(HOME):
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "hasten" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hasten"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "hasten"


def _name(stamp: Stamp) -> str:
    """One name for one question: of what, in which size and steps, for which budget."""
    asked = (stamp.weights, stamp.scheduler, stamp.hardware, stamp.steps, stamp.shape, stamp.budget, stamp.tokenizer, stamp.length)
    return f"{stamp.weights}-{hashlib.sha256(repr(asked).encode()).hexdigest()[:12]}.yaml"


def _found_anywhere(recipe: Recipe) -> Recipe:
    """The same, with the adapter's file named by its whole path: the copy lies in another folder."""
    adapter = recipe.adapter
    if adapter is None or not adapter.path or find(adapter) != adapter.place:  # a student that comes with hasten
        return recipe
    return recipe.model_copy(update={"adapter": adapter.model_copy(update={"path": str(adapter.place.absolute())})})
