"""Blocks compiled one by one, full graph: as many graphs as without us, and nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.recipe import Recipe
from tests.conformance.loop import ALTERNATE, ONCE_BLOCKS, Loop, accelerated, assert_same, solver, turn
from tests.conformance.small import every

COMPILED = ["FluxTransformer2DModel", "WanTransformer3DModel", "PixArtTransformer2DModel"]
LOOP = Loop(still=True, steps=4)


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def compiled(name: str) -> tuple[nn.Module, Counting]:
    """A network of its own, every repeated block compiled as one graph."""
    torch._dynamo.reset()
    model, backend = every()[name].made(), Counting()
    blocks = [child for kind in model.modules() if isinstance(kind, nn.ModuleList) for child in kind]
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    return model, backend


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [ALTERNATE, ONCE_BLOCKS], ids=["network", "blocks"])
@pytest.mark.parametrize("name", COMPILED)
def test_as_many_graphs_as_without(name: str, recipe: Recipe) -> None:
    small = every()[name]
    model, backend = compiled(name)
    expected, alone = turn(small, model, LOOP, solver(small)), backend.graphs
    model, backend = compiled(name)
    found = accelerated(name, recipe, LOOP, model=model)
    assert found.stood_in and not (recipe is ONCE_BLOCKS and found.refusal)
    assert backend.graphs == alone > 0
    assert_same(found, expected)
