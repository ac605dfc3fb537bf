"""LoRA that comes, is swapped and goes inside a session, and weights that are offloaded: every run is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from torch import nn

import hasten
from hasten.recipe import Recipe
from tests.conformance.loop import (
    ALTERNATE,
    ONCE,
    ONCE_BLOCKS,
    Loop,
    Result,
    accelerated,
    assert_same,
    solver,
    turn,
)
from tests.conformance.small import every

SOME = ["FluxTransformer2DModel", "WanTransformer3DModel", "HunyuanVideoTransformer3DModel"]
RECIPES = pytest.mark.parametrize("recipe", [ONCE, ONCE_BLOCKS], ids=["network", "blocks"])
LOOP = Loop(still=True, steps=3)


def add_lora(model: nn.Module, name: str, seed: int) -> None:
    """An adapter with weights that act at once, and the only one that does."""
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name=name)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if f".{name}." in path:
            parameter.data.normal_(0, 0.5, generator=generator)
    model.set_adapter(name)  # type: ignore[operator]


STAGES: list[Callable[[nn.Module], None]] = [
    lambda model: None,
    lambda model: add_lora(model, "one", 1),
    lambda model: add_lora(model, "two", 2),
    lambda model: model.set_adapter("one"),  # type: ignore[operator]
    lambda model: model.delete_adapters(["one", "two"]),  # type: ignore[operator]
]
"""What is done to a network before each run: nothing, load, load another, swap, unload."""


@RECIPES
@pytest.mark.parametrize("name", SOME)
def test_lora_loaded_swapped_and_unloaded(name: str, recipe: Recipe) -> None:
    small = every()[name]
    bare, model, scheduler = small.made(), small.made(), solver(every()[name])
    expected: list[Result] = []
    for change in STAGES:
        change(bare)
        expected.append(turn(small, bare, LOOP, solver(small)))
    assert not torch.equal(expected[0].outputs[0, 1], expected[1].outputs[0, 1]), "the adapter does nothing"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="hasten")
        with hasten.accelerate(model, recipe, scheduler=scheduler):
            for change, want in zip(STAGES, expected, strict=True):
                change(model)
                assert_same(turn(small, model, LOOP, scheduler), want)
    assert_same(turn(small, model, LOOP, scheduler), expected[-1], tolerance=0)


def group_offload(model: nn.Module) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )


def model_offload(model: nn.Module) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))


def sequential_offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [group_offload, model_offload, sequential_offload])
@pytest.mark.parametrize("recipe", [ALTERNATE, ONCE, ONCE_BLOCKS], ids=["alternate", "network", "blocks"])
@pytest.mark.parametrize("name", SOME)
def test_offloaded_weights(name: str, recipe: Recipe, offload: Callable[[nn.Module], None]) -> None:
    small = every()[name]
    model = small.made()
    expected = turn(small, model, LOOP, solver(small))
    offload(model)
    found = accelerated(name, recipe, LOOP, model=model)
    assert found.stood_in and not (recipe is ONCE_BLOCKS and found.refusal)
    assert_same(found, expected)
    assert_same(turn(small, model, LOOP, solver(small)), expected, tolerance=0)
