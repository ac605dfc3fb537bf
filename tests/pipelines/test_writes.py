"""Networks that write into what they are given: each call runs exactly once, and what only reads is still skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor, nn

import hasten
from hasten.caching.modules import ModuleReuse
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.pipelines.host import Call, Layout
from hasten.pipelines.seams.writes import Writes, kind_of, twin
from hasten.recipe import Recipe
from tests.conformance.models import a_h_image
from tests.conformance.small import SMALL, Small, normal

RULE = Every(interval=2)
RECIPES = {
    "network": Recipe(name="network", reuse=NetworkReuse(rule=RULE)),
    "blocks": Recipe(name="blocks", reuse=StackReuse(lead=0, rule=RULE)),
    "modules": Recipe(name="modules", reuse=ModuleReuse(self_attention=RULE, feed_forward=RULE)),
}
STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore:hasten")
Mode = Callable[[int], str]


def glm() -> tuple[Small, nn.Module]:
    assert a_h_image, "describes the class"
    small = SMALL["GlmImageTransformer2DModel"]
    return small, small.made()


def loop(small: Small, model: nn.Module, recipe: Recipe | None, mode: Mode) -> tuple[list[Tensor], list[int], Any]:
    """Outputs of a loop that stands still, the number of cached tokens behind each step, and the session."""
    cache, scheduler = GlmImageKVCache(num_layers=3), FlowMatchEulerDiscreteScheduler()
    outputs, lengths = [], []
    given = small.inputs(1, 0)
    session = hasten.accelerate(model, recipe, scheduler=scheduler) if recipe is not None else None
    with torch.no_grad():
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(0)
        for step, time in enumerate(scheduler.timesteps):
            cache.set_mode(mode(step))
            x = small.sample(int(mode(step) == "write"), 0)  # what is cached is another image
            outputs.append(small.call(model, x, 0.7, {**given, "kv_caches": cache})[0])
            lengths.append(sum(tensor.shape[1] for tensor in cache[0].k_caches))
            scheduler.step(outputs[-1], time, x)
    if session is not None:
        session.close()
    return outputs, lengths, session


@pytest.mark.parametrize("name", RECIPES)
def test_a_call_that_writes_runs_exactly_once(name: str) -> None:
    small, model = glm()
    expected, lengths, _ = loop(small, model, None, lambda step: "write")
    assert lengths == [lengths[0] * (step + 1) for step in range(STEPS)], "each call must add to the cache"
    found, got, session = loop(small, model, RECIPES[name], lambda step: "write")
    assert got == lengths
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert {event.action for event in session.trace.events} == {"compute"}
    notes = [note for note in session.trace.notes if "kv_caches" in note]
    assert len(notes) == 1 and "neither skipped nor repeated" in notes[0]


@pytest.mark.parametrize("name", RECIPES)
def test_calls_that_only_read_are_skipped_and_never_answered_by_ones_that_write(name: str) -> None:
    small, model = glm()

    def mode(step: int) -> str:
        return "write" if step == 0 else "read"

    expected, lengths, _ = loop(small, model, None, mode)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-2), "one kind of call must not pass for the other"
    found, got, session = loop(small, model, RECIPES[name], mode)
    assert got == lengths
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    actions = {(event.step, event.action) for event in session.trace.events}
    assert any(action == "reuse" for _, action in actions) and {a for step, a in actions if step == 0} == {"compute"}


def test_structure_is_not_learned_on_the_callers_own_cache() -> None:
    """The look at the blocks is given NaN; a cache that saw it would be spoiled for good."""
    small, model = glm()
    _, _, session = loop(small, model, RECIPES["blocks"], lambda step: "read")
    assert not any("kv_caches" in note for note in session.trace.notes)
    cache, scheduler = GlmImageKVCache(num_layers=3), FlowMatchEulerDiscreteScheduler()
    with torch.no_grad(), hasten.accelerate(model, RECIPES["blocks"], scheduler=scheduler):
        scheduler.set_timesteps(STEPS)
        cache.set_mode("write")
        small.call(model, small.sample(0, 0), 1.0, {**small.inputs(1, 0), "kv_caches": cache})
    assert len(cache[0].k_caches) == 1 and bool(torch.isfinite(cache[0].k_caches[0]).all())


class Toy(nn.Module):
    """Stands for networks with caches of other shapes; `how` is what it does to its argument `memory`."""

    def __init__(self, how: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.how = how

    def forward(self, sample: Tensor, timestep: Tensor, memory: Any = None, flags: Any = None) -> Tensor:
        self.how(memory, sample)
        return sample


def _spoil(memory: Tensor, x: Tensor) -> None:
    memory[0] = x


def _turn(memory: dict[str, Tensor], x: Tensor) -> None:
    memory["states"] = memory.pop("images") * 2


WRITERS: dict[str, tuple[Callable[[Any, Tensor], None], Callable[[], Any]]] = {
    "a tensor": (_spoil, lambda: torch.zeros(3, 2, 4)),
    "tensors in a dict of dicts": (lambda m, x: _spoil(m[0]["k"], x), lambda: {0: {"k": torch.zeros(3, 2, 4)}}),
    "a list that grows": (lambda m, x: m.append(x), list),
    "a dict that is filled": (lambda m, x: m.update(k=x), dict),
    "an entry that is replaced": (lambda m, x: m.update(k=m["k"] + 1), lambda: {"k": torch.zeros(2)}),
}
READERS: dict[str, tuple[Callable[[Any, Tensor], None], Callable[[], Any]]] = {
    "nothing": (lambda m, x: None, lambda: None),
    "a list that is taken apart": (lambda m, x: m.pop(), lambda: [torch.zeros(2), torch.ones(2)]),
    "a dict that is turned into another": (_turn, lambda: {"images": torch.ones(2)}),
    "a generator and numbers": (lambda m, x: None, lambda: [torch.Generator(), 3, 0.5]),
}


def measured(how: Callable[[Any, Tensor], None], memory: Any, *, inference: bool = False) -> str:
    with torch.inference_mode(inference):
        model = Toy(how)
        call = Call(Layout.of(model), (normal(0, 2, 4) + 3, torch.ones(1)), {"memory": memory})
        writes, kind = Writes(), kind_of(call)
        writes.watch(call, lambda: model(*call.args, **call.kwargs))
        return writes.argument(kind)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written(name: str, inference: bool) -> None:
    how, make = WRITERS[name]
    with torch.inference_mode(inference):
        memory = make()
    assert measured(how, memory, inference=inference) == "memory"


@pytest.mark.parametrize("name", READERS)
def test_what_is_only_read(name: str) -> None:
    how, make = READERS[name]
    assert measured(how, make()) == ""


def test_kinds_differ_by_flags_and_not_by_numbers_or_tensors() -> None:
    layout = Layout.of(Toy(_spoil))

    def kind(**given: Any) -> object:
        return kind_of(Call(layout, (torch.zeros(1), torch.ones(1)), given))

    assert kind() == kind(memory=[torch.zeros(2)]) == kind(memory=torch.ones(2)) == kind(flags="read") == ()
    cached = {"cached": False, "at": 0}
    assert kind(flags=cached) == kind(flags={**cached, "at": 7}) != kind(flags={**cached, "cached": True})
    memory = GlmImageKVCache(num_layers=2)
    before = kind(memory=memory)
    memory.set_mode("read")
    assert kind(memory=memory) != before and kind(memory=memory) != kind(memory=memory, flags="x")


def test_a_twin_shares_no_tensor_and_keeps_what_is_one_object_one() -> None:
    layout, tensor = Layout.of(Toy(_spoil)), torch.zeros(2, requires_grad=True) * 2
    memory = GlmImageKVCache(num_layers=1)
    memory[0].store(tensor, tensor)
    call = Call(layout, (tensor, torch.ones(1)), {"memory": memory, "flags": [memory, {"x": tensor}]})
    own = twin(call)
    assert own.kwargs["flags"][0] is own.kwargs["memory"] is not memory
    assert own.kwargs["memory"][0].k_caches[0] is own.args[0] is own.kwargs["flags"][1]["x"] is not tensor
    assert torch.equal(own.args[0], tensor)


def test_guidance_leaves_out_no_call_that_writes() -> None:
    """Both branches write: the unconditional one must not be answered for."""
    small, model = glm()

    def run(recipe: Any) -> list[int]:
        caches, scheduler, lengths = {1: GlmImageKVCache(3), 2: GlmImageKVCache(3)}, DDIMScheduler(clip_sample=False), []
        x = small.sample(0, 0)
        session = hasten.accelerate(model, recipe, scheduler=scheduler) if recipe is not None else None
        with torch.no_grad():
            scheduler.set_timesteps(8)
            for time in scheduler.timesteps:
                outs = []
                for seed, cache in caches.items():
                    cache.set_mode("write")
                    given = {**small.inputs(seed, 0), "kv_caches": cache}
                    outs.append(small.call(model, x, float(time) / 1000, given)[0])
                x = scheduler.step(outs[1] + 4 * (outs[0] - outs[1]), time, x)[0]
                lengths.append(sum(t.shape[1] for t in caches[2][0].k_caches))
        if session is not None:
            session.close()
        return lengths

    assert run("guidance-interval") == run(None)


def test_copies_for_the_look_are_not_made_of_networks() -> None:
    layout = Layout.of(Toy(_spoil))
    net = nn.Linear(1, 1)
    own = twin(Call(layout, (torch.zeros(1), torch.ones(1)), {"memory": net, "flags": copy.copy}))
    assert own.kwargs["memory"] is net and own.kwargs["flags"] is copy.copy
