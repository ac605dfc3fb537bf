"""A job stops within one block of work, and the model is then what it was: the next run is equal bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hasten
from hasten.ui.engine import read
from hasten.ui.engine.cancel import Cancelled, blocks, networks, stoppable
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.place import Place
from tests.hosts import (
    FLUX_CALL,
    PIXART_CALL,
    UNET_CALL,
    WAN_CALL,
    small_flux,
    small_pixart,
    small_unet,
    small_wan,
)
from tests.ui.engines import TEXT

HOSTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan": (small_wan, WAN_CALL), "pixart": (small_pixart, PIXART_CALL), "flux": (small_flux, FLUX_CALL), "unet": (small_unet, UNET_CALL),
}  # fmt: skip


def made(pipe: Any, call: dict[str, Any], recipe: str) -> np.ndarray[Any, Any]:
    with hasten.accelerate(pipe, recipe):
        output = pipe(prompt="a seven", generator=torch.Generator().manual_seed(3), output_type="np", **call)
    return np.asarray(output.frames if hasattr(output, "frames") else output.images)


def hooks(pipe: Any) -> list[Any]:
    """Everything by which a network could differ from before, weights aside."""
    return [
        (id(module), list(module._forward_pre_hooks), list(module._forward_hooks), sorted(module.__dict__))
        for network in networks(pipe) for module in network.modules()
    ]  # fmt: skip


class Counted:
    """Raises at one of the looks, counted from 1; counts them all."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.seen = at, 0

    def __call__(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise Cancelled


@pytest.mark.parametrize(
    ("host", "recipe"), [("wan", "plain"), ("wan", "balanced"), ("pixart", "balanced"), ("flux", "teacache"), ("flux", "plain"), ("unet", "balanced")]
)
def test_a_run_after_a_cancel_at_every_step_is_the_reference(host: str, recipe: str) -> None:
    make, call = HOSTS[host]
    pipe = make()
    reference = made(pipe, call, recipe)
    before = hooks(pipe)
    counted = Counted()
    evaluations = Counted()
    with stoppable(pipe, counted, evaluations):
        assert np.array_equal(made(pipe, call, recipe), reference), "the hooks change nothing"
    assert hooks(pipe) == before
    for number in range(1, evaluations.seen + 1):  # every evaluation of the network of every step
        with pytest.raises(Cancelled), stoppable(pipe, Counted(), Counted(number)):
            made(pipe, call, recipe)
        assert hooks(pipe) == before, f"after a cancel at evaluation {number}"
        if number % 4 == 1 or number == evaluations.seen:
            assert np.array_equal(made(pipe, call, recipe), reference), f"after a cancel at evaluation {number}"
    for number in (1, counted.seen // 2, counted.seen):  # within blocks: of the text encoder, the denoiser, the autoencoder
        with pytest.raises(Cancelled), stoppable(pipe, Counted(number)):
            made(pipe, call, recipe)
        assert hooks(pipe) == before
        assert np.array_equal(made(pipe, call, recipe), reference), f"after a cancel at block {number} of {counted.seen}"


def test_no_more_than_one_block_runs_after_the_cancel() -> None:
    """Told to stop while a block runs, that block is the last one."""
    pipe, ran = small_wan(), 0
    told = False

    def check() -> None:
        if told:
            raise Cancelled

    def after(*_: Any) -> None:
        nonlocal told, ran
        ran += 1
        told = told or ran == 11

    handles = [block.register_forward_hook(after) for block in pipe.transformer.blocks]
    try:
        with pytest.raises(Cancelled), stoppable(pipe, check):
            made(pipe, WAN_CALL, "plain")
    finally:
        for handle in handles:
            handle.remove()
    assert ran == 11


def test_blocks_are_those_of_all_networks_once() -> None:
    pipe = small_wan()
    found = blocks(pipe.transformer)
    assert len(found) == len({id(block) for block in found})
    assert {id(block) for block in pipe.transformer.blocks} <= {id(block) for block in found}
    assert len(networks(pipe)) == 3


def test_compiled_blocks_are_left_alone() -> None:
    """A hook on them would compile them anew."""
    model = nn.Module()
    model.parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.parts[1].compile()
    assert [id(block) for block in blocks(model)] == [id(model), id(model.parts[0])]


@pytest.mark.parametrize("recipe", ["plain", "text-balanced", "fast-dllm"])
def test_texts_stop_between_steps_and_come_back(recipe: str) -> None:
    pipe = hasten.load("tiny-dllm")

    def write() -> Any:
        with hasten.accelerate(pipe, recipe):
            return pipe.generate(prompts="sort: i p m d n k j . =", max_new_tokens=12, generator=torch.Generator().manual_seed(0)).sequences

    reference, before, counted = write(), hooks(pipe), Counted()
    with stoppable(pipe, counted):
        assert torch.equal(write(), reference)
    for number in range(1, counted.seen + 1, 3):
        with pytest.raises(Cancelled), stoppable(pipe, Counted(number)):
            write()
        assert hooks(pipe) == before
    assert torch.equal(write(), reference)


def test_the_desk_keeps_its_model_warm_and_right_after_a_cancel(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.make()
    desk = Desk(place)
    ask = read(TEXT)
    first = desk.perform("0" * 16, ask, lambda _: None, lambda: False)
    pipe = next(iter(desk._warm.values()))
    looks = 0

    def stopped() -> bool:
        nonlocal looks
        looks += 1
        return looks > 9

    with pytest.raises(Cancelled):
        desk.perform("1" * 16, ask, lambda _: None, stopped)
    again = desk.perform("2" * 16, ask, lambda _: None, lambda: False)
    assert next(iter(desk._warm.values())) is pipe
    assert again["text"] == first["text"] and again["tokens"] == first["tokens"]
    assert len(desk.outputs.list()) == 2  # nothing is left of the cancelled one
