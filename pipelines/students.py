"""The students that come with hasten: distilled adapters of the bundled models, each a folder with a recipe."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hasten.errors import ModelError, RefusedError
from hasten.pipelines.lora import BUNDLED, Lora, find, marks
from hasten.pipelines.recipes import recipe
from hasten.recipe import Recipe
from hasten.samplers.few_calls import FewCalls


def bundled() -> list[Recipe]:
    """Their recipes, by name. The network is needed by no one to list them."""
    folders = sorted(file.parent for file in BUNDLED.glob("*/recipe.yaml"))
    return [recipe(str(folder / "recipe.yaml")).model_copy(update={"name": folder.name}) for folder in folders]


def students_of(model: str) -> list[Recipe]:
    """Those of one bundled model, fewest calls first."""
    return sorted((each for each in bundled() if each.models == (model,)), key=calls_of)


def calls_of(student: Recipe) -> int:
    """How often a student evaluates its network."""
    assert isinstance(student.sampler, FewCalls)
    return student.sampler.calls


def student_for(networks: Mapping[str, nn.Module], calls: int) -> Recipe | None:
    """The student with so many calls whose base has the very weights of one of `networks` (site -> network); None where there
    is none."""
    for student in bundled():
        if calls_of(student) != calls or student.adapter is None:
            continue
        made = Lora.load(find(student.adapter))
        network = networks.get(made.site)
        if network is not None and _is_base_of(made, network):
            return student
    return None


def taught(recipe: Recipe, networks: Mapping[str, nn.Module]) -> Recipe:
    """`recipe` for these networks: one that asks for a student that comes with hasten has that student's adapter and sampler
    in place of its own `reuse`, or nothing but its own `reuse` where there is no such student.

    Raises `RefusedError` where there is neither.
    """
    if recipe.adapter is None or recipe.adapter.calls is None:
        return recipe
    student = student_for(networks, recipe.adapter.calls)
    if student is not None:
        return recipe.model_copy(update={"adapter": student.adapter, "sampler": student.sampler, "reuse": None})
    if recipe.reuse is None:
        known = ", ".join(dict.fromkeys(each.models[0] for each in bundled() if calls_of(each) == recipe.adapter.calls))
        raise RefusedError(
            f"Recipe {recipe.name!r} is a distilled student by {recipe.adapter.calls} call(s), and hasten has one for"
            f" {known or 'no model'} only. Train one (hasten train pairs --model FOLDER) and use its recipe.yaml, or take fast."
        )
    return recipe.model_copy(update={"adapter": None})


def _is_base_of(made: Lora, network: nn.Module) -> bool:
    try:
        made.check(network)
    except ModelError:
        return False
    return "weights" in made.facts and marks(network, made.layers) is not None and made.remark(network) is None
