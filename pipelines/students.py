"""The students that come with hasten: distilled adapters of the bundled models, each a folder with a recipe."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hasten.errors import ModelError
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


def _is_base_of(made: Lora, network: nn.Module) -> bool:
    try:
        made.check(network)
    except ModelError:
        return False
    return "weights" in made.facts and marks(network, made.layers) is not None and made.remark(network) is None
