"""Aborts, other resolutions and values that are not finite: nothing stale is used, nothing spoiled is kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from hasten.recipe import Recipe
from tests.conformance.loop import (
    ALTERNATE,
    ALTERNATE_BLOCKS,
    Loop,
    accelerated,
    assert_same,
    distance,
    plain,
)

RECIPES = pytest.mark.parametrize("recipe", [ALTERNATE, ALTERNATE_BLOCKS], ids=["network", "blocks"])
FOUR = Loop(steps=4)


@RECIPES
def test_run_after_an_aborted_one(name: str, recipe: Recipe) -> None:
    """A loop that was left in the middle leaves nothing behind."""
    aborted = dataclasses.replace(FOUR, stop=3, before=lambda step, branch, x: x + 1)
    found, fresh = accelerated(name, recipe, aborted, FOUR), accelerated(name, recipe, FOUR)
    assert_same(found, fresh, tolerance=0)


@RECIPES
def test_next_run_at_another_resolution(name: str, recipe: Recipe) -> None:
    larger = dataclasses.replace(FOUR, size=lambda step: 1)
    assert_same(accelerated(name, recipe, FOUR, larger), accelerated(name, recipe, larger), tolerance=0)


@RECIPES
def test_resolution_that_changes_in_mid_run(name: str, recipe: Recipe) -> None:
    """The first evaluations at a new size are computed, whatever the schedule says."""
    growing = Loop(still=True, steps=4, size=lambda step: int(step >= 3))
    found = accelerated(name, recipe, growing)
    assert found.actions(1) & {"reuse"}
    assert_same(found, plain(name, growing))


@RECIPES
def test_not_a_number(name: str, recipe: Recipe) -> None:
    """Computed at step 2, it must not come back at step 3, which the schedule would skip."""

    def spoiled(step: int, branch: int, x: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan) if step == 2 else x

    loop = Loop(still=True, steps=4, before=spoiled)
    found, expected = accelerated(name, recipe, loop), plain(name, loop)
    for branch in (1, 2):
        assert torch.isfinite(found.outputs[3, branch]).all(), "a value that is not finite was reused"
        assert distance(expected.outputs[3, branch], found.outputs[3, branch]) < 1e-4
