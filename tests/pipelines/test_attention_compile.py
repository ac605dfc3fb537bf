"""Sparse attention inside blocks that are compiled one by one, full graph: as many graphs as without us."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hasten
from hasten.recipe import Recipe
from tests.conformance.loop import Loop, Result, accelerated, assert_same, distance, solver, turn
from tests.conformance.small import every
from tests.conformance.test_compile import Counting
from tests.pipelines.attention_recipes import FULL, PART, STOOD_FOR, changed

LOOP = Loop(steps=3)
QUICK = ["WanTransformer3DModel"]
SLOW = ["FluxTransformer2DModel", "PixArtTransformer2DModel", "CogVideoXTransformer3DModel", "HunyuanVideoTransformer3DModel",
        "LTXVideoTransformer3DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel", "MochiTransformer3DModel"]  # fmt: skip
CLASSES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def runs(name: str, recipe: Recipe | None) -> tuple[Result, Counting, nn.Module]:
    torch._dynamo.reset()
    small, backend = every()[name], Counting()
    model = small.made()
    if model._repeated_blocks:
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        for block in model.transformer_blocks:
            block.compile(backend=backend, fullgraph=True)
    found = turn(small, model, LOOP, solver(small)) if recipe is None else accelerated(name, recipe, LOOP, model=model)
    return found, backend, model


@pytest.mark.parametrize("name", CLASSES)
def test_as_many_graphs_as_without(name: str) -> None:
    """Dense and sparse steps, layers and branches, and the look at marked latents: all of it is one graph."""
    expected, alone, _ = runs(name, None)
    found, backend, model = runs(name, changed(FULL, warm=0.4))
    assert found.session is not None
    assert {call.action for call in found.session.trace.attention} == {"dense", "sparse"}, found.session.trace.notes
    assert_same(found, expected, 2e-5)
    assert backend.graphs == alone.graphs > 0
    part = accelerated(name, PART, LOOP, model=model)
    assert max(distance(expected.outputs[key], part.outputs[key]) for key in expected.outputs) > 1e-4
    assert backend.graphs == alone.graphs, "another session uses the same graphs"


def test_graphs_of_before_serve_again_afterwards() -> None:
    """A session costs one compilation of each kind of block, and none is left to pay when it is over."""
    name = QUICK[0]
    small = every()[name]
    expected, backend, model = runs(name, None)
    before = backend.graphs
    accelerated(name, STOOD_FOR, LOOP, model=model)
    during = backend.graphs
    assert during == 2 * before
    found = turn(small, model, LOOP, solver(small))
    assert backend.graphs == during
    assert_same(found, expected, tolerance=0)


@pytest.mark.slow
def test_inductor() -> None:
    """With the compiler that users have."""
    torch._dynamo.reset()
    name = QUICK[0]
    small = every()[name]
    model = small.made()
    expected = turn(small, model, LOOP, solver(small))
    model.compile_repeated_blocks(fullgraph=True)
    found = accelerated(name, changed(FULL, warm=0.4), LOOP, model=model)
    assert found.session is not None and any(call.sparse for call in found.session.trace.attention)
    assert_same(found, expected, 1e-4)


@pytest.mark.slow
def test_whole_network() -> None:
    """A network that is one compiled function: its attention is reached all the same."""
    torch._dynamo.reset()
    name, backend = QUICK[0], Counting()
    small = every()[name]
    model = small.made()
    expected = turn(small, model, LOOP, solver(small))
    model.compile(backend=backend)
    scheduler: Any = solver(small)
    with hasten.accelerate(model, PART, scheduler=scheduler) as session:
        found = turn(small, model, LOOP, scheduler)
    assert any(call.sparse and call.density < 1 for call in session.trace.attention)
    assert max(distance(expected.outputs[key], found.outputs[key]) for key in expected.outputs) > 1e-4
