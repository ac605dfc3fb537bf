"""The clock: follows a loop hasten does not own, by its scheduler's ticks and its denoiser's calls.

`scheduler.set_timesteps` starts a run, `scheduler.step` ends a step, each denoiser call in between is a
branch. Nothing is asked of the pipeline, so pipelines without `cache_context` (two thirds of diffusers'
0.42) and solvers that evaluate twice per step need no special case.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.level import Level
from hasten.scheduler import is_flow, solver_levels, solver_times, solver_weights
from hasten.session import Attachment
from hasten.step import Step

Tick = Callable[[Tensor], None]


@dataclass(slots=True)
class _Branches:
    """Which conditioning tensors have been seen in this run, and which branch each belongs to.

    A branch is keyed by (site, context name, content of the conditioning, repetition within the step).
    Pointers are only a short cut: the tensor is kept alive so that its address cannot be recycled.
    """

    numbers: dict[Hashable, int] = field(default_factory=dict)
    known: dict[Hashable, tuple[Tensor, Hashable]] = field(default_factory=dict)
    called: list[Hashable] = field(default_factory=list)
    trusted: set[Hashable] = field(default_factory=set)
    expected: int = 0

    def enter(
        self, site: str, context: str | None, conditioning: Sequence[Tensor], first_step: bool
    ) -> tuple[int, bool]:
        """(branch number, may it be trusted?) of a call that is about to run."""
        base: Hashable = (site, context, *map(self._content, conditioning))
        repetition = sum(key[0] == base for key in self.called)  # type: ignore[index]
        key = (base, repetition)
        self.called.append(key)
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers)
        if first_step:
            self.trusted.add(key)
        return self.numbers[key], key in self.trusted

    def end_step(self, first_step: bool) -> None:
        """A branch that appears later (another prompt from here on, an expert switch) is trusted once it
        has *replaced* an earlier one; calls on top of the usual number come from somebody else's loop."""
        if first_step:
            self.expected = len(self.called)
        elif len(self.called) <= self.expected:
            self.trusted.update(self.called)
        self.called = []

    def _content(self, tensor: Tensor) -> Hashable:
        # Inference tensors count no versions, so a change in place would go unseen: they are read each time.
        version = None if tensor.is_inference() else tensor._version
        address = (tensor.data_ptr(), tuple(tensor.shape), version)
        if version is not None and address in self.known:
            return self.known[address][1]
        # Reading two numbers is a host synchronisation, but only when a new tensor turns up: in nearly
        # all pipelines once per branch and run.
        wide = tensor.detach().double() if tensor.device.type != "mps" else tensor.detach().float()
        wide = wide if wide.ndim else wide.reshape(1)
        weights = torch.arange(1, wide.shape[-1] + 1, device=wide.device, dtype=wide.dtype)
        numbers = tuple(torch.stack([wide.sum(), (wide * weights).sum()]).tolist())
        content = (tuple(tensor.shape), str(tensor.device), *numbers)
        for old, (_, seen) in list(self.known.items()):
            if seen == content:  # rebuilt each step: keep one copy alive, not one per step
                del self.known[old]
        self.known[address] = (tensor, content)
        return content


class Clock:
    """Knows where the host's loop stands.

    run: index of the present run, -1 before the first. step: the latest `Step` entered, None when idle.
    on_run: called when a run starts. on_tick: called with the model output given to the solver.
    ours: asked when a run is set up; False for a run of somebody else who uses the same scheduler.
    """

    def __init__(self, ours: Callable[[], bool] = lambda: True) -> None:
        self.ours = ours
        self.run = -1
        self.step: Step | None = None
        self.on_run: list[Callable[[], None]] = []
        self.on_tick: list[Tick] = []
        self.on_end: list[Callable[[], None]] = []
        self.times: list[float] = []
        self.weights: list[float | None] = []
        self.levels: list[Level | None] = []
        self.scheduler: Any = None
        self._attachment = Attachment()
        self._index: int | None = None
        self._first_index = 0
        self._pending = False
        self._thread = 0
        self._clue = "unknown"
        self._branches = _Branches()

    # --- following the scheduler -----------------------------------------------------------------

    def follow(self, scheduler: Any, *, begun: bool = True) -> None:
        """Attach to `scheduler` (and let go of the one before). begun: timesteps that it has are those of a run that
        is about to start; those of a pipeline's scheduler may be left from its last run."""
        self._attachment.restore()
        self._attachment = Attachment()
        self.scheduler = scheduler
        for name, after in (("set_timesteps", self._timesteps_set), ("step", self._stepped)):
            self._attachment.replace(scheduler, name, _Follower(scheduler, name, after))
        if begun and getattr(scheduler, "num_inference_steps", None):
            self._timesteps_set((), {})

    def release(self) -> None:
        """Give the scheduler its own methods back."""
        self._attachment.restore()
        self._index, self._pending, self.step = None, False, None

    def _timesteps_set(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pending, self._index, self.step = self.ours(), None, None
        self._thread = threading.get_ident()

    def _stepped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._index is None or threading.get_ident() != self._thread:
            return
        output = kwargs.get("model_output", args[0] if args else None)
        if kwargs.get("eta"):  # a stochastic DDIM step: the output enters with another factor
            self.weights = [None] * len(self.times)
        for call in self.on_tick:
            call(output)  # type: ignore[arg-type]
        self._branches.end_step(self._index == self._first_index)
        self._index += 1
        if self._index >= len(self.times):
            self._index, self.step = None, None
            for end in self.on_end:
                end()

    @property
    def run_times(self) -> list[float]:
        """`Step.time` of each step of the present run."""
        return self.times[self._first_index :]

    # --- following the denoiser ------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """True between the first denoiser call of a run and its last solver step."""
        return self._index is not None

    def enter(
        self,
        site: str,
        conditioning: Tensor | Sequence[Tensor] | None = None,
        context: str | None = None,
        timestep: Any = None,
    ) -> tuple[Step, bool] | None:
        """The step of a denoiser call that is about to run and whether its branch can be trusted.

        None when the call does not belong to the followed loop (no run in progress, another thread).
        """
        if threading.get_ident() != self._thread:
            return None
        if self._pending:
            self._begin(timestep)
        if self._index is None or not self._ours(timestep):
            return None
        known = (
            ()
            if conditioning is None
            else (conditioning,)
            if isinstance(conditioning, Tensor)
            else conditioning
        )
        branch, trusted = self._branches.enter(site, context, known, self._index == self._first_index)
        i = self._index
        total = len(self.times) - self._first_index
        self.step = Step(i - self._first_index, total, self.times[i], branch, self.weights[i], self.levels[i])
        return self.step, trusted

    def _ours(self, timestep: Any) -> bool:
        """False for a call at another time than the loop's: somebody else's loop shares this network.

        Where the pipeline hands on a view of `scheduler.timesteps`, its address tells. Otherwise the value does,
        but reading it costs a synchronisation, so on an accelerator such calls are believed. A foreign loop that was
        told by value could meet the very same time later, so nothing more of this run is followed then.
        """
        if (
            not isinstance(timestep, Tensor)
            or not isinstance(self.scheduler.timesteps, Tensor)
            or self._index is None
        ):
            return True
        nodes = self.scheduler.timesteps
        if self._index == self._first_index and self._clue == "unknown":
            self._clue = _clue(timestep, nodes, self._index)
        if self._clue == "address":
            return bool(timestep.data_ptr() == nodes.data_ptr() + self._index * nodes.element_size())
        if self._clue == "unknown" or timestep.device.type != "cpu":
            return True
        value, expected = float(timestep.flatten()[0]), CLUES[self._clue](float(nodes[self._index]))
        if abs(value - expected) > 1e-2 * max(abs(expected), 1e-3):
            self._index, self.step = None, None
            return False
        return True

    def _begin(self, timestep: Any) -> None:
        self._pending = False
        self.times = solver_times(self.scheduler)
        self.weights = solver_weights(self.scheduler)
        self.levels = solver_levels(self.scheduler, self.times, flow=is_flow(self.scheduler))
        self._index = self._first_index = _starting_index(self.scheduler, timestep, len(self.times))
        self._branches = _Branches()
        self._clue = "unknown"
        self.run += 1
        for call in self.on_run:
            call()


CLUES: dict[str, Callable[[float], float]] = {
    "timestep": lambda t: t,
    "share": lambda t: t / 1000,
    "rest": lambda t: 1 - t / 1000,
}
"""What pipelines pass to their network in place of the scheduler's timestep t."""


def _clue(timestep: Tensor, nodes: Tensor, index: int) -> str:
    """How the first call's time relates to the scheduler's: by address, by one of `CLUES`, or "unknown"."""
    alike = timestep.dtype == nodes.dtype and timestep.device == nodes.device
    if alike and timestep.data_ptr() == nodes.data_ptr() + index * nodes.element_size():
        return "address"
    if timestep.device.type != "cpu" or not timestep.numel():
        return "unknown"
    value, node = float(timestep.flatten()[0]), float(nodes[index])
    return next(
        (name for name, of in CLUES.items() if abs(value - of(node)) <= 1e-2 * max(abs(of(node)), 1e-3)),
        "unknown",
    )


class _Follower:
    """A scheduler method that tells the clock about each call."""

    def __init__(
        self, scheduler: Any, name: str, after: Callable[[tuple[Any, ...], dict[str, Any]], None]
    ) -> None:
        method = getattr(scheduler, name)
        # Pipelines inspect the signature for `sigmas=`, `eta=`. First, because it also takes over the attributes of
        # what it wraps, which may be another session's follower.
        functools.update_wrapper(self, method)
        self._method, self._name, self._after = method, name, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._name == "step":
            self._after(args, kwargs)
            return self._method(*args, **kwargs)
        result = self._method(*args, **kwargs)
        self._after(args, kwargs)
        return result


def _starting_index(scheduler: Any, timestep: Any, total: int) -> int:
    """Where in the list of timesteps the loop begins (image-to-image starts in the middle)."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return min(int(begin), total - 1)
    if isinstance(timestep, Tensor) and timestep.numel() and torch.is_tensor(scheduler.timesteps):
        value = float(timestep.detach().flatten()[0])
        nodes = [float(node) for node in scheduler.timesteps.tolist()]
        # What stands for the first node (1000 / 1000) may be the number of a later one: flows end at timestep 1.
        first = any(math.isclose(value, of(nodes[0]), abs_tol=1e-6) for of in CLUES.values())
        if value in nodes and not first:
            return nodes.index(value)
    return 0
