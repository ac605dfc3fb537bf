"""Where a list of blocks starts again with another stream, the part before it can be left out, and only that."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

import hasten
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.pipelines.seams.structure import BlockCall, Stack, Watcher
from hasten.recipe import Recipe
from tests.conformance.small import every


def watched(places: list[tuple[int, int]]) -> Stack | str:
    """Blocks (a, b) -> (a, b); places: which of the last (a, b, fresh, fresh) the next block takes as a and b."""
    watcher, blocks = (
        Watcher("blocks", len(places) + 1),
        nn.ModuleList(nn.Identity() for _ in range(len(places) + 1)),
    )
    args = (torch.randn(1, 6, 2), torch.randn(1, 3, 2))
    for index in range(len(blocks)):
        out = (args[0] + 1, args[1] + 1)
        watcher.observe(BlockCall(index, args, {}, out), index)
        if index < len(places):
            streams = (*out, torch.randn(1, 6, 2), torch.randn(1, 3, 2))
            args = tuple(streams[place] for place in places[index])  # type: ignore[assignment]
    return watcher.stack()


@pytest.mark.parametrize(
    ("places", "num"),
    [
        ([(0, 1)] * 3, 4),
        (
            [(0, 1), (2, 0), (0, 1)],
            2,
        ),  # from the third block on, the first stream is what the second one reads
        ([(0, 1), (0, 1), (2, 0)], 3),
    ],
)
def test_length_of_a_chain(places: list[tuple[int, int]], num: int) -> None:
    stack = watched(places)
    assert isinstance(stack, Stack), stack
    assert (stack.num, stack.slots) == (num, (0, 1))


def test_added_streams_are_no_new_chain() -> None:
    """What is not identical, but of the same shape in the same place, was added to."""
    stack = watched([(0, 1), (2, 1), (0, 1)])
    assert isinstance(stack, Stack) and (stack.num, stack.injected) == (4, 1)


@pytest.mark.parametrize("kind", ["", "image"])
def test_decoder_of_motif_video_always_runs(kind: str) -> None:
    small = every()["MotifVideoTransformer3DModel"]
    model, scheduler, ran = small.made(), FlowMatchEulerDiscreteScheduler(), Counter[str]()
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(model, name)):
            block.register_forward_hook(lambda *_, name=f"{name}.{index}": ran.update([name]))
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    given = {**small.inputs(1, 0), **(small.injections[kind](5, 0) if kind else {}), "return_dict": False}
    outputs = []
    with torch.no_grad():
        plain = small.call(model, small.sample(0, 0), 0.7, given)[0]
        recipe = Recipe(reuse=StackReuse(lead=1, rule=Every(interval=2)))
        with hasten.accelerate(model, recipe, scheduler=scheduler) as session:
            for step, node in enumerate(scheduler.timesteps):
                if step == 1:
                    ran.clear()
                outputs.append(small.call(model, small.sample(0, 0), 0.7, given)[0])
                scheduler.step(outputs[-1], node, outputs[-1])
    for found in outputs:
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert list(session.trace.structure.values()) == [2, 2]
    names = [
        f"{name}.{index}"
        for name, num in (("transformer_blocks", 2), ("single_transformer_blocks", 4))
        for index in range(num)
    ]
    assert [ran[name] for name in names] == [5, 2, 2, 2, 5, 5]


@pytest.mark.parametrize(
    ("name", "blocks", "share"),
    [("SD3Transformer2DModel", "the last 1 of the", True), ("MotifVideoTransformer3DModel", "the last", True),
     ("PixArtTransformer2DModel", "", False)],
)  # fmt: skip
def test_what_is_always_computed_is_said_once(name: str, blocks: str, share: bool) -> None:
    """The last block of SD3 drops a stream, so it cannot be made up; nobody should look for it among the skipped ones."""
    small = every()[name]
    model, scheduler = small.made(), FlowMatchEulerDiscreteScheduler()
    recipe = Recipe(name="half", reuse=StackReuse(lead=0, rule=Every(interval=2)))
    with torch.no_grad(), hasten.accelerate(model, recipe, scheduler=scheduler) as run:
        for _ in range(2):
            scheduler.set_timesteps(3)
            for time in scheduler.timesteps:
                x = small.sample(0, 0)
                small.call(model, x, float(time) / 1000, small.inputs(1, 0))
                scheduler.step(x, time, x)
    said = [note for note in run.trace.notes if "cannot be left out" in note]
    assert len(said) == share and all(blocks in note and "% of the weights" in note for note in said), run.trace.notes
