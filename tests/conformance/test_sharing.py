"""One network, several users: a session touches its own loop only."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import Tensor

import hasten
from hasten.recipe import Recipe
from tests.conformance.loop import (
    ALTERNATE,
    ALTERNATE_BLOCKS,
    Loop,
    accelerated,
    assert_same,
    built,
    solver,
    tensor,
    turn,
)

RECIPES = pytest.mark.parametrize("recipe", [ALTERNATE, ALTERNATE_BLOCKS], ids=["network", "blocks"])
FOUR = Loop(steps=4)


@RECIPES
def test_second_thread_gets_plain_outputs(name: str, recipe: Recipe) -> None:
    """A call from another thread in the middle of a run is neither answered nor remembered."""
    small, model = built(name)

    def call() -> Tensor:
        with torch.no_grad():
            return tensor(small.call(model, small.sample(50, 0), 0.3, small.inputs(51, 0)))

    expected, seen = call(), []

    def intrude(step: int, branch: int, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: seen.append(call()))
        thread.start()
        thread.join()
        return x

    found = accelerated(name, recipe, Loop(steps=4, before=intrude))
    assert len(seen) == 8 and all(torch.equal(value, expected) for value in seen)
    assert_same(found, accelerated(name, recipe, FOUR), tolerance=0)


@RECIPES
def test_two_sessions_on_one_network(name: str, recipe: Recipe) -> None:
    """Two loops with a scheduler and a session each, one after the other."""
    small, model = built(name)
    one, two = solver(small), solver(small)
    expected = accelerated(name, recipe, FOUR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            hasten.accelerate(model, recipe, scheduler=one) as first,
            hasten.accelerate(model, recipe, scheduler=two) as second,
        ):
            results = [turn(small, model, FOUR, scheduler) for scheduler in (one, two)]
    assert all(len(session.trace.runs) == 1 for session in (first, second))
    for result in results:
        assert_same(result, expected, tolerance=1e-6)
