"""What every seam inside a network must do, on any model: a test file subclasses `SeamContract` and gives it cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import hasten
from hasten.pipelines.session import Session
from hasten.recipe import Recipe
from tests.contract import seeded

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model and what it is called with. conditioning: the argument by which branches differ; other: another size.

    inside: dotted name of a module that runs on computed steps only, to break it.
    """

    build: Callable[[], tuple[nn.Module, Inputs]]
    recipe: Recipe
    inside: str
    conditioning: str = "encoder_hidden_states"
    other: Inputs = field(default_factory=dict)

    def branch(self, call: Inputs, number: int) -> Inputs:
        """The same call with another conditioning."""
        return call if number == 0 else {**call, self.conditioning: seeded(90 + number, *call[self.conditioning].shape)}


def loop(
    model: nn.Module, recipe: Recipe, calls: Callable[[int], list[Inputs]], *, steps: int = 12, runs: int = 1
) -> tuple[list[list[Tensor]], Session]:
    """Call `model` with every one of `calls(step)` on each step; the solver's result is thrown away."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    outputs: list[list[Tensor]] = []
    with torch.no_grad(), hasten.accelerate(model, recipe, scheduler=scheduler) as run:
        for number in range(runs):
            scheduler.set_timesteps(steps)
            scheduler.set_begin_index(0)  # the timestep that the network is given stands still, so it tells nothing
            for i, time in enumerate(scheduler.timesteps):
                outputs.append([tensor(model(**call)) for call in calls(number * steps + i)])
                scheduler.step(outputs[-1][0], time, outputs[-1][0])
    return outputs, run


def tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def plainly(model: nn.Module, call: Inputs) -> Tensor:
    with torch.no_grad():
        return tensor(model(**call))


def state_of(model: nn.Module) -> dict[str, dict[str, int]]:
    """Identity of everything in the `__dict__` of every module."""
    found = {}
    for name, module in model.named_modules():
        inner = {key: id(value) for key, value in vars(module).items()}
        children = {f"child {key}": id(value) for key, value in module._modules.items()}
        found[name] = inner | children | {"hooks": len(module._forward_pre_hooks) + len(module._forward_hooks)}
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:hasten")
class SeamContract:
    def test_lossless_on_identical_input(self, case: Case) -> None:
        model, call = case.build()
        expected = plainly(model, call)
        outputs, run = loop(model, case.recipe, lambda _: [call])
        assert not any("refused" in note for note in run.trace.notes), run.trace.notes
        assert any(event.action in ("reuse", "forecast") for event in run.trace.events)
        assert run.report().computed_fraction < 1 and run.report().bytes_held > 0
        for (out,) in outputs:
            close(out, expected)

    @pytest.mark.parametrize("num", [2, 3])
    def test_branches_are_isolated(self, case: Case, num: int) -> None:
        model, call = case.build()
        calls = [case.branch(call, number) for number in range(num)]
        expected = [plainly(model, one) for one in calls]
        assert not torch.allclose(expected[0], expected[1], rtol=1e-2), "branches that do not differ test nothing"
        outputs, run = loop(model, case.recipe, lambda _: calls)
        assert {e.branch for e in run.trace.events if e.action != "compute"} == set(range(num))
        for step in outputs:
            for found, wanted in zip(step, expected, strict=True):
                close(found, wanted)

    def test_guidance_toggled_in_the_middle(self, case: Case) -> None:
        model, call = case.build()
        calls = [case.branch(call, number) for number in range(2)]
        expected = [plainly(model, one) for one in calls]
        outputs, _ = loop(model, case.recipe, lambda i: calls if i not in (4, 5, 6, 9) else calls[:1])
        for step in outputs:
            for found, wanted in zip(step, expected, strict=False):
                close(found, wanted)

    @pytest.mark.parametrize("when", [1, 2, 3])
    def test_not_a_number_does_not_come_back(self, case: Case, when: int) -> None:
        model, call = case.build()
        seen = [0]

        def bad(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            seen[0] += 1
            return output * math.nan if seen[0] == when else None

        model.get_submodule(case.inside).register_forward_hook(bad)
        outputs, _ = loop(model, case.recipe, lambda _: [call])
        broken = sum(not bool(torch.isfinite(out).all()) for (out,) in outputs)
        assert broken == 1, "the one that was computed wrong, and no stand-in made of it"

    def test_another_resolution(self, case: Case) -> None:
        model, call = case.build()
        other = {**call, **case.other}
        expected = {False: plainly(model, call), True: plainly(model, other)}
        outputs, _ = loop(model, case.recipe, lambda i: [other if 5 <= i < 9 or i >= 14 else call], runs=2)
        for i, (out,) in enumerate(outputs):
            close(out, expected[5 <= i < 9 or i >= 14])

    def test_restart_after_an_exception(self, case: Case) -> None:
        model, call = case.build()
        second = case.branch(call, 1)
        scheduler = FlowMatchEulerDiscreteScheduler()
        with torch.no_grad(), hasten.accelerate(model, case.recipe, scheduler=scheduler) as run:
            for stop, now in ((4, call), (99, second)):
                scheduler.set_timesteps(12)
                scheduler.set_begin_index(0)
                outputs = []
                for i, time in enumerate(scheduler.timesteps):
                    if i == stop:
                        break  # what an exception in the host looks like from here
                    outputs.append(tensor(model(**now)))
                    scheduler.step(outputs[-1], time, outputs[-1])
            events = [e for e in run.trace.events if e.run == 1 and e.step == 0]
        assert {event.action for event in events} == {"compute"}, "nothing of the broken run may be reused"
        for out in outputs:
            close(out, plainly(model, second))

    def test_the_model_is_restored_exactly(self, case: Case) -> None:
        model, call = case.build()
        before, expected = state_of(model), plainly(model, call)
        loop(model, case.recipe, lambda _: [call])
        assert state_of(model) == before
        assert torch.equal(plainly(model, call), expected)

    def test_cap_on_memory_turns_it_off(self, case: Case) -> None:
        model, call = case.build()
        scheduler = FlowMatchEulerDiscreteScheduler()
        limits = hasten.Limits(max_cache_bytes=64)
        with torch.no_grad(), hasten.accelerate(model, case.recipe, scheduler=scheduler, limits=limits) as run:
            scheduler.set_timesteps(12)
            scheduler.set_begin_index(0)
            for time in scheduler.timesteps:
                out = tensor(model(**call))
                scheduler.step(out, time, out)
        assert any("above the cap" in note for note in run.trace.notes)
        assert all(event.action == "compute" for event in run.trace.events)
