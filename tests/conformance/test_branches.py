"""Branches are told apart by what they are conditioned on, and none ever sees what another has computed."""

from __future__ import annotations

import functools

import pytest

from hasten.recipe import Recipe
from tests.conformance.loop import ALTERNATE, ALTERNATE_BLOCKS, Loop, Result, accelerated, assert_same, plain

RECIPES = pytest.mark.parametrize("recipe", [ALTERNATE, ALTERNATE_BLOCKS], ids=["network", "blocks"])
SHORT = 4


def own_path(step: int, branch: int, x):  # type: ignore[no-untyped-def]
    """Latents that depend on the step alone, so that no branch acts on another through the solver."""
    return x * (1 - 0.1 * step)


def loop(*seeds: int) -> Loop:
    return Loop(branches=lambda step: seeds, still=True, before=own_path, steps=SHORT)


@functools.cache
def alone(name: str, recipe: Recipe, seed: int) -> Result:
    return accelerated(name, recipe, loop(seed))


@RECIPES
@pytest.mark.parametrize("num", [2, 3, 4])
def test_each_branch_is_as_if_alone(name: str, recipe: Recipe, num: int) -> None:
    """Up to four (image, text, negative, layered guidance): the very outputs that each gives in a loop of its own."""
    seeds = range(1, num + 1)
    found = accelerated(name, recipe, loop(*seeds))
    assert found.actions(1) & {"reuse"}
    for seed in seeds:
        own = Result(
            {key: value for key, value in found.outputs.items() if key[1] == seed}, session=found.session
        )
        assert_same(own, alone(name, recipe, seed), tolerance=0 if recipe is ALTERNATE else 1e-6)


@RECIPES
def test_guidance_toggled_and_reordered(name: str, recipe: Recipe) -> None:
    """The second branch comes, goes and comes again, in another order: identical input must give identical output."""
    order = {0: (1, 2), 1: (1, 2), 2: (1,), 3: (1,), 4: (2, 1), 5: (2, 1)}
    toggled = Loop(branches=order.__getitem__, still=True, steps=6)
    found = accelerated(name, recipe, toggled)
    assert found.stood_in
    assert_same(found, plain(name, toggled))


@RECIPES
def test_guidance_that_begins_later(name: str, recipe: Recipe) -> None:
    """A branch that was not there in the first step is computed until it is known to belong to the loop."""
    late = Loop(branches=lambda step: (1,) if step < 2 else (1, 2), still=True)
    assert_same(accelerated(name, recipe, late), plain(name, late))
