"""A small denoising loop around a bare denoiser, and what the checks ask of its result."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor, nn

import hasten
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.forecast import Hold
from hasten.pipelines.session import Session
from hasten.recipe import Recipe
from tests.conformance.small import Inputs, Small, every

STEPS = 4
STILL = 0.7
"""The time of a loop that stands still: no scheduler's first time, so that it is not taken for one."""

ALTERNATE = Recipe(name="alternate", reuse=NetworkReuse(rule=Every(interval=2), forecast=Hold()))
"""Every second evaluation is the one before."""

ALTERNATE_BLOCKS = Recipe(
    name="alternate-blocks", reuse=StackReuse(lead=1, rule=Every(interval=2), forecast=Hold())
)
"""In every second evaluation only the first block runs; the whole network is held where blocks are refused."""

ONCE = Recipe(name="once", reuse=NetworkReuse(rule=Every(interval=99), forecast=Hold(), of="residual"))
ONCE_BLOCKS = Recipe(name="once-blocks", reuse=StackReuse(lead=1, rule=Every(interval=99), forecast=Hold()))
"""Only the first step is computed."""

ROUNDING = 1e-4
"""max|a - b| / max|a| that float32 may lose when a residual is taken and added again."""

NAMES = sorted(every())


@functools.cache
def built(name: str) -> tuple[Small, nn.Module]:
    """The description and one model of a class, shared by all tests; they must leave it as it was."""
    small = every()[name]
    return small, small.made()


def solver(small: Small, *, heun: bool = False) -> Any:
    """A new scheduler that fits the class's prediction."""
    if small.flow:
        return FlowMatchHeunDiscreteScheduler() if heun else FlowMatchEulerDiscreteScheduler(shift=2.0)
    return HeunDiscreteScheduler() if heun else DDIMScheduler(clip_sample=False)


@dataclass
class Loop:
    """What is asked of each step of a loop.

    branches(step): seeds of the conditionings that are evaluated, in order. still: the same latents and the same
    time at every step. injection: one of the class's injections, given to every call. size(step): resolution.
    before(step, branch, x): the latents that are given to the network in place of x.
    """

    branches: Callable[[int], Sequence[int]] = lambda step: (1, 2)
    still: bool = False
    injection: Callable[[int, int], Inputs] | None = None
    size: Callable[[int], int] = lambda step: 0
    before: Callable[[int, int, Tensor], Tensor] = lambda step, branch, x: x
    heun: bool = False
    steps: int = STEPS
    stop: int | None = None

    def conditions(self, small: Small, step: int, seed: int) -> Inputs:
        """New objects for each call, because some networks take their arguments apart."""
        extra = self.injection(100 + seed, self.size(step)) if self.injection else {}
        return {**small.inputs(seed, self.size(step)), **extra}


@dataclass
class Result:
    """outputs: (step, branch) -> what the network returned. session: None for a plain run."""

    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    session: Session | None = None

    @property
    def refusal(self) -> str:
        """Why blocks are not skipped; empty when they are."""
        assert self.session is not None
        return next((note for note in self.session.trace.notes if "instead" in note), "")

    def actions(self, step: int) -> set[str]:
        assert self.session is not None
        return {event.action for event in self.session.trace.events if event.step == step}

    @property
    def stood_in(self) -> int:
        """How many decisions were to skip."""
        assert self.session is not None
        return sum(event.action in ("reuse", "forecast") for event in self.session.trace.events)


def tensor(value: Any) -> Tensor:
    """The first tensor of what a network returned."""
    if isinstance(value, Tensor):
        return value
    return tensor(value[0] if isinstance(value, tuple | list) else next(iter(value.values())))


def turn(small: Small, model: nn.Module, loop: Loop, scheduler: Any) -> Result:
    """One run of the loop, accelerated or not."""
    found = Result()
    x = small.sample(0, loop.size(0))
    scheduler.set_timesteps(loop.steps)
    if loop.still:  # the time that the network is given does not tell where the loop begins
        getattr(scheduler, "set_begin_index", lambda index: None)(0)
    with torch.no_grad():
        for step, node in enumerate(scheduler.timesteps):
            if step == loop.stop:
                break
            if loop.size(step) != loop.size(step - 1) and step:
                x = small.sample(step, loop.size(step))
            t = STILL if loop.still else float(node) / 1000
            outputs = []
            for branch in loop.branches(step):
                given = loop.before(step, branch, x.clone())
                outputs.append(tensor(small.call(model, given, t, loop.conditions(small, step, branch))))
                found.outputs[step, branch] = outputs[-1].clone()
            guided = outputs[0] + 0.5 * sum(outputs[1:], torch.zeros_like(outputs[0]))
            moved = scheduler.step(_like(guided, x), node, x.clone(), return_dict=False)[0]
            x = x if loop.still else moved
    found.latents = x
    return found


def plain(name: str, loop: Loop) -> Result:
    """The loop without hasten."""
    small, model = built(name)
    return turn(small, model, loop, solver(small, heun=loop.heun))


def accelerated(name: str, recipe: str | Recipe, *loops: Loop, model: nn.Module | None = None) -> Result:
    """The last of `loops`, all run in one session."""
    small, shared = built(name)
    scheduler = solver(small, heun=loops[0].heun)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="hasten")
        with hasten.accelerate(model or shared, recipe, scheduler=scheduler) as session:
            for loop in loops:
                found = turn(small, model or shared, loop, scheduler)
    found.session = session
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|a|."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def assert_same(found: Result, expected: Result, tolerance: float = ROUNDING) -> None:
    """All outputs of two results agree."""
    assert found.outputs.keys() == expected.outputs.keys()
    for key, value in expected.outputs.items():
        off = distance(value, found.outputs[key])
        assert off <= tolerance, (
            f"step {key[0]}, branch {key[1]}: off by {off:.1e}; {found.session and found.session.trace.notes}"
        )


def _like(value: Tensor, x: Tensor) -> Tensor:
    """What moves the latents: some networks predict more than them (a variance, other tokens) or less (not what is
    only concatenated), and some return an image without its batch dimension."""
    value = value if value.ndim == x.ndim else value.unsqueeze(0)
    common = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, x.shape, strict=True))
    moved = torch.zeros_like(x)
    moved[common] = value[common]
    return moved
