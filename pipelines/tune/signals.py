"""What one full run tells: both branches of every step, so that schedules of steps and of branches are judged without the
network.

With a first-order solver the latents move by sum_i w_i g_i, g_i = u_i + s (c_i - u_i). Forecasts by polynomials, held
differences and corrections are linear in the outputs that were evaluated, so a composition of them moves the latents by
sum_i a_i c_i + b_i u_i, and its distance to the plain run, were the outputs unchanged by it, is a quadratic form of the
outputs' Gram matrix (`pipelines/bench/oracle.py` does so for one branch).

Shapes: N steps; the values of a run are c_1 .. c_N, then u_1 .. u_N where there is guidance: M = N or 2 N of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.caching.network import NetworkReuse
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.session import Session
from hasten.recipe import Guidance, Recipe
from hasten.samplers.guidance import GuidanceState
from hasten.step import Step


@dataclass(slots=True)
class Signals:
    """One recorded run. times, weights: of each step (see `Step`). gram: float64 [M, M]. scale: s, None without guidance."""

    times: list[float]
    weights: list[float]
    gram: Tensor
    scale: float | None

    @property
    def total(self) -> int:
        return len(self.times)

    def error(self, track: Tensor) -> float:
        """How far the latents are from the plain run's on the way, if they move along `track` [N, M]: root mean square over
        the steps, relative to how far the plain run moves them.

        On the way, not at the end alone: a plan whose errors cancel at the end has shown the network other latents, and its
        answers are not those that were recorded.
        """
        off = track - self.plain()
        squares = ((off @ self.gram) * off).sum(1).clamp_min(0)
        last = self.plain()[-1]
        return float((squares.mean() / (last @ self.gram @ last).clamp_min(1e-30)).sqrt())

    def plain(self) -> Tensor:
        """How the plain run has moved them after each step [N, M]."""
        each = torch.diag(torch.tensor(self.weights, dtype=torch.float64)).cumsum(0)
        return each if self.scale is None else torch.cat([self.scale * each, (1 - self.scale) * each], 1)


def predicted(reuse: NetworkReuse, guidance: Guidance | None, of: Signals, computed: set[int]) -> Tensor:
    """How a composition has moved the latents after each step [N, M], were the outputs those of the plain run. computed: steps
    with any evaluation.

    The parts' own states run on unit vectors, in the order in which the seams ask them, so that this cannot disagree with
    what runs on a model.
    """
    total, values = of.total, torch.eye(len(of.gram), dtype=torch.float64)
    state = reuse.start(of.times)
    guide: GuidanceState | None = guidance.start() if guidance is not None else None  # type: ignore[attr-defined]
    moved, track = torch.zeros(len(values), dtype=torch.float64), []
    for i, (time, weight) in enumerate(zip(of.times, of.weights, strict=True)):
        branches = []
        c, u = values[i], values[i + total] if of.scale is not None else None
        for number, value in enumerate((c, u)):
            if value is None:
                continue
            step = Step(i, total, time, number, weight)
            answer = None if i in computed else state.answer(step, value)
            if answer is None:
                if number == 1 and guide is not None and not guide.needs(step):
                    value = guide.estimate(step, c)
                elif number == 1 and guide is not None:
                    guide.observe(step, c, value)
                answer = state.observe(step, value, [value])
            branches.append(answer[0])
        combined = branches[0] if of.scale is None else branches[1] + of.scale * (branches[0] - branches[1])
        moved = moved + weight * combined
        track.append(moved)
    return torch.stack(track)


class _Both(Guidance):
    """Evaluates both branches and keeps them. It has no kind: no recipe can name it."""

    def start(self) -> GuidanceState:
        return _BothState()


class _BothState:
    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def needs(self, step: Step) -> bool:
        return True

    def observe(self, step: Step, c: Tensor, u: Tensor) -> None:
        self.pairs[step.index] = (c.detach(), u.detach())

    def estimate(self, step: Step, c: Tensor) -> Tensor:
        return c

    def tensors(self) -> list[Tensor]:
        return []


@dataclass(slots=True)
class Recorder:
    """found: the signals of the run that was made while the recorder was on; None where its solver is not first-order and
    linear in the outputs, with the reason in `why`. guided: whether the host evaluates two branches that can be told apart.
    shape: of one row of the network's input."""

    found: Signals | None = None
    why: str = "no run was made"
    guided: bool = False
    shape: tuple[int, ...] = ()
    steps: int = 0
    combined: list[Tensor] = field(default_factory=list)


@contextmanager
def recording(pipe: Any, guided: bool) -> Iterator[Recorder]:
    """Record the run that is made in it. guided: whether the host evaluates a second branch; if its parts cannot be told
    apart, what the solver receives is recorded alone."""
    recorder = Recorder()
    with accelerate(pipe, Recipe(guidance=_Both() if guided else None)) as session:
        session._warned.update(_expected(session))
        session.clock.on_tick.append(lambda output: recorder.combined.append(output.detach()))
        session.clock.on_end.append(lambda: _end(recorder, session))
        yield recorder


def _expected(session: Session) -> set[str]:
    """Sentences that a recording need not hear."""
    name = session.recipe.name or "this recipe"
    return {f"{name}: guidance left out no evaluation; the branches never agreed enough."}


def _end(recorder: Recorder, session: Session) -> None:
    clock, outputs = session.clock, recorder.combined
    recorder.steps, recorder.combined = len(outputs), []
    seam = session.guidance
    recorder.shape = session.shape or ()
    recorder.guided = seam is not None and seam.roles is not None
    times = clock.run_times
    weights = [weight for weight in clock.weights[-len(times) :] if weight is not None]
    if len(weights) != len(times) or len(outputs) != len(times):
        recorder.why = f"{type(clock.scheduler).__name__} is not first-order and linear in the network's output"
        return
    scale = None
    if seam is not None and seam.roles is not None and isinstance(seam.state, _BothState):
        pairs = [seam.state.pairs[i] for i in sorted(seam.state.pairs)]
        if len(pairs) == len(outputs):
            scale = seam.roles.scale
            channels = outputs[0].shape[1]
            outputs = [c[:, :channels] for c, _ in pairs] + [u[:, :channels] for _, u in pairs]
    values = torch.stack([value.double().flatten() for value in outputs])
    recorder.found = Signals(times, weights, (values @ values.T).cpu(), scale)
    recorder.why = ""
