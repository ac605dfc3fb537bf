"""Every part of text diffusion has a recipe, so that nobody has to write one to try it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import hasten.caching
import hasten.samplers
from hasten.caching.kv import TokenKV
from hasten.errors import RecipeError
from hasten.part import Part
from hasten.pipelines.recipes import acts_on, catalogue, recipe
from hasten.samplers.commit import CommitRule
from hasten.samplers.revise import RevisePolicy
from hasten.samplers.scores import Score
from hasten.samplers.text_blocks import BlockRule
from hasten.samplers.text_ends import EndRule
from hasten.samplers.verify import Verifier

FAMILIES = (TokenKV, CommitRule, Score, RevisePolicy, BlockRule, EndRule, Verifier)
WITHOUT = {"oracle": "it has to be told the answer; `hasten bench dllm` does"}
"""Kind -> why there is no recipe of it."""


def within(part: Part) -> Iterator[Part]:
    yield part
    for name in type(part).model_fields:
        value = getattr(part, name)
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Part):
                yield from within(inner)


@pytest.fixture(scope="module")
def used() -> set[type[Part]]:
    return {type(part) for entry in catalogue() for part in within(entry.recipe)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_has_a_recipe(family: type[Part], used: set[type[Part]]) -> None:
    for package in (hasten.samplers, hasten.caching):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    members = {kind: member for kind, member in family.members().items() if member.__module__.startswith("hasten.")}
    missing = {kind for kind, member in members.items() if member not in used}
    assert missing == WITHOUT.keys() & members.keys()
    assert members


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_is_in_the_docs(family: type[Part]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "text-diffusion.md").read_text(encoding="utf-8")
    table = page.split("## Which parts there are")[1].split("\n## ")[0]
    kinds = [kind for kind, member in family.members().items() if member.__module__.startswith("hasten.")]
    assert [kind for kind in kinds if f"`{kind}`" not in table] == []


def test_prompts_need_not_be_frozen() -> None:
    found = recipe("value-cache").kv
    assert found is not None and found.prompt_every is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["rcr:steps=8", "remdm:eta=0.1,schedule=rescale", "remdm-conf+d2-cache", "soft-order+dpad", "early-exit"])
def test_new_recipes_are_for_texts(name: str) -> None:
    assert acts_on(recipe(name)) == "text diffusion"


def test_a_wrong_schedule_is_told() -> None:
    with pytest.raises(RecipeError, match="'cap' or 'rescale'"):
        recipe("remdm:schedule=slow")
