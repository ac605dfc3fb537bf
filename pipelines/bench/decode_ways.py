"""Which recipes with drafts are measured, what their rows are called, and what a draft of theirs costs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import UsageError
from hasten.pipelines.decode.drafters_candidates import Candidates
from hasten.pipelines.decode.drafters_small import SmallModel
from hasten.pipelines.recipes import catalogue, decode_own
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Drafting, FromFile, Recipe
from hasten.samplers.decode.pace import Goodput, Steady
from hasten.samplers.drafters.copy_input import Copy
from hasten.samplers.drafters.jacobi import Jacobi
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.drafters.mixed import Mixed
from hasten.samplers.drafters.tri_gram import TriGram
from hasten.samplers.drafters.trie import Trie
from hasten.samplers.drafters_own.student import Student

EVERY, PACED = "every round", "goodput"
"""When is drafted: always, for what drafts are worth; or where it pays, for what that saves."""

TEXT_DRAFTERS = (LookUp, Trie, TriGram, Copy, Jacobi)
"""Drafters that run no network: their drafts cost the reading of nodes, and nothing else."""

FAMILIES = ("text", "heads", "model", "dear")
"""By what a draft costs, the least first."""

OTHER_SIZES = ("look-up:nodes=16", "look-up-or-draft:nodes=5", "speculative:nodes=8", "dyspec:nodes=8,depth=8")
"""Measured besides, for as many drafts as transformers' settings may make."""


@dataclass(frozen=True, slots=True)
class Way:
    """A recipe with drafts under the name of its rows, which is no path. student, training: of one that reads what was trained,
    the name of the training's folder, and how long it took."""

    name: str
    recipe: Recipe
    student: str = ""
    training: str = ""

    @property
    def keys(self) -> dict[str, Any]:
        """These as keys of a row; empty ones are left out."""
        return {key: value for key, value in {"student": self.student, "training": self.training}.items() if value}

    def named(self) -> Recipe:
        """The recipe under this name."""
        return self.recipe.model_copy(update={"name": f"{self.name} of {self.student}" if self.student else self.name})

    def paces(self) -> dict[str, Recipe]:
        """The recipe with drafts in every round, and with goodput, which drafts where it pays."""
        return {EVERY: self.recipe.model_copy(update={"pace": Steady()}), PACED: self.recipe.model_copy(update={"pace": Goodput()})}


def way(which: str) -> Way:
    """What a user named: a recipe with or without arguments, a recipe's file, or the folder of a training whose student drafts.

    Raises `UsageError` for a recipe without drafts, and for a folder without a student that drafts.
    """
    recipe = trained(Path(which)) if Path(which).is_dir() else find_recipe(which)
    if recipe.draft is None:
        raise UsageError(f"{recipe.name or which} drafts nothing, so there is nothing to measure here. Name a recipe that does, such as look-up.")
    name = _without_path(recipe.name or Path(which).stem)
    file = next(_files(recipe.draft), None)
    if file is None:
        return Way(name, recipe)
    folder = file.place.resolve()
    run = folder.parent if folder.name == "student" else folder
    return Way(name, recipe, run.name, _training(run))


def every() -> list[Way]:
    """All lossless recipes that draft, but those that read a file which a training has to write first."""
    return [
        Way(entry.name, entry.recipe) for entry in catalogue()
        if entry.recipe.draft is not None and getattr(entry.recipe.verify, "lossless", True) and not any(_files(entry.recipe.draft))
    ]


def trained(folder: Path) -> Recipe:
    """The recipe whose drafter reads what lies in the folder of a training, or in its `student/`. Raises `UsageError` where there
    is nothing that drafts."""
    inner = folder / "student" if (folder / "student").is_dir() else folder
    for make in (decode_own.medusa, decode_own.ppd, decode_own.gated_mtp, decode_own.first_routers):
        recipe = make(path=str(inner))
        assert recipe.draft is not None
        if any((inner / _weights(part)).is_file() for part in _files(recipe.draft)):
            return recipe.model_copy(update={"name": make.__name__.replace("_", "-")})
    raise UsageError(f"'{folder}' holds no student that drafts. Name the folder of hasten train medusa, mtp, ppd or first, or its student/.")


def family(drafter: Any) -> str:
    """What a draft costs: "text" looks into texts alone; "heads" were trained on the model, and say their drafts from its own
    states; "model" runs a smaller network; the "dear" ones run the model itself, in part or whole, or a network as large.
    transformers has nothing to compare heads and dear ones with."""
    if isinstance(drafter, Mixed):
        return max((family(drafter.first), family(drafter.second)), key=FAMILIES.index)
    if isinstance(drafter, Candidates):
        return "text" if drafter.which == "prompt-lookup" else "model"
    if isinstance(drafter, Student):
        return "heads"
    return "text" if isinstance(drafter, TEXT_DRAFTERS) else "model" if isinstance(drafter, SmallModel) else "dear"


def when(recipe: Recipe) -> str:
    """`EVERY`, `PACED`, or another pace's kind."""
    return PACED if recipe.pace is None else EVERY if isinstance(recipe.pace, Steady) else recipe.pace.kind


def _files(draft: Drafting) -> Iterator[FromFile]:
    """The parts of a drafter that read a file."""
    parts: Iterable[Any] = (draft, getattr(draft, "skip", None), getattr(draft, "first", None), getattr(draft, "second", None))
    return (part for part in parts if isinstance(part, FromFile))


def _weights(part: FromFile) -> str:
    return part.file if isinstance(part, Student) else str(getattr(part, "FILE", ""))


def _without_path(name: str) -> str:
    """A recipe's name without the folder in it: results say nothing of the machine that they come from."""
    first, _, arguments = name.partition(":")
    kept = ",".join(each for each in arguments.split(",") if each and not each.strip().startswith("path="))
    return f"{first}:{kept}" if kept else first


def _training(run: Path) -> str:
    """How long a student was trained, as its folder says it; "" where it does not."""
    try:
        told = json.loads((run / "config.json").read_text(encoding="utf-8"))["train"]
        return f"{told['steps']} steps of {told['batch']} texts, learning rate {told['lr']:g}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
