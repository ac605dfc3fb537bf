"""Schedules judged on a recorded run, without evaluating the network.

With a first-order solver the latents move by sum_i w_i v_i, w_i the solver's step lengths and v_i the
outputs. A cache with a fixed schedule and polynomial forecasts is linear too: it moves by sum_i c_i v_i,
with c_i = 0 where it does not compute. The distance it ends up with, were the network's outputs unchanged,
is (c - w)' G (c - w) with G the Gram matrix of the recorded outputs: microseconds per schedule. The best
schedule for one recorded run is the oracle of that run; the best on several is a preset.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Listed, Spread
from hasten.clock import Clock
from hasten.errors import RefusedError
from hasten.forecast import Hold, Polynomial
from hasten.session import Attachment
from hasten.step import Step


@dataclass(slots=True)
class Recording:
    """Outputs given to the solver during one plain run.

    times, weights: per evaluation (see `Step`). gram: (N, N) float64 inner products of the outputs.
    """

    times: list[float]
    weights: list[float]
    gram: Tensor


@contextlib.contextmanager
def record(scheduler: Any) -> Iterator[list[Recording]]:
    """Record every run of `scheduler` while open. Raises `RefusedError` for solvers that are not first-order."""
    clock = Clock()
    found: list[Recording] = []
    outputs: list[Tensor] = []
    clock.on_tick.append(lambda output: outputs.append(output.detach().double().flatten().clone()))

    def end() -> None:
        if any(weight is None for weight in clock.weights):
            raise RefusedError(
                f"{type(clock.scheduler).__name__} is not first-order and linear in the network's output, so a"
                " recorded run says nothing about another schedule. Record with FlowMatchEuler, Euler or DDIM."
            )
        values = torch.stack(outputs)
        outputs.clear()
        found.append(Recording(list(clock.times), [w for w in clock.weights if w is not None], values @ values.T))

    clock.on_end.append(end)
    clock.follow(scheduler)
    attachment = Attachment()
    followed = scheduler.step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        clock.enter("recording")  # there is no denoiser gate to tell the clock that the loop has begun
        return followed(*args, **kwargs)

    attachment.replace(scheduler, "step", functools.wraps(followed)(stepped))
    try:
        yield found
    finally:
        attachment.restore()
        clock.release()


def response(policy: NetworkReuse, times: list[float], weights: list[float], computed: set[int]) -> Tensor:
    """c (N,) float64: how much of each evaluation's output ends up in the latents when only `computed` are evaluated.

    Runs the policy's real state on unit vectors, so it cannot disagree with what runs on a model.
    """
    if policy.of != "output" or not isinstance(policy.forecast, Hold | Polynomial):
        raise RefusedError(
            f"A {policy.forecast.kind} forecast of the {policy.of} is not linear in the outputs, so a recorded run cannot"
            " judge it. Use hold or polynomial forecasts of the output."
        )
    num = len(times)
    state = policy.start(times)
    total = torch.zeros(num, dtype=torch.float64)
    unit = torch.eye(num, dtype=torch.float64)
    here = unit[0]
    for i, (time, weight) in enumerate(zip(times, weights, strict=True)):
        step = Step(i, num, time, 0, weight)
        answer = None if i in computed else state.answer(step, here)
        output = state.observe(step, here, [unit[i]])[0] if answer is None else answer[0]
        total += weight * output
    return total


def distance(policy: NetworkReuse, recording: Recording, computed: set[int]) -> float:
    """Norm of the final latents' error on a recorded run, relative to how far the run moved them."""
    weights = torch.tensor(recording.weights, dtype=torch.float64)
    off = response(policy, recording.times, recording.weights, computed) - weights
    return float(((off @ recording.gram @ off).clamp_min(0) / (weights @ recording.gram @ weights)).sqrt())


def search(policy: NetworkReuse, recordings: list[Recording], num: int, *, starts: int = 3, rounds: int = 6) -> set[int]:
    """The `num` evaluations that minimise the mean squared distance over `recordings` (the first always among them).

    Coordinate descent from the `starts` best members of the `Spread` family: each computed position in turn
    moves to its best free place, until nothing improves, at most `rounds` times. Deterministic.
    """
    total = len(recordings[0].times)
    if num >= total:
        return set(range(total))

    def cost(indices: frozenset[int]) -> float:
        return sum(distance(policy, recording, set(indices)) ** 2 for recording in recordings)

    family = {
        frozenset(Spread(share=num / total, ends=ends / 4, skew=skew).computed(total, recordings[0].times))
        for ends in range(5)
        for skew in (0.6, 0.8, 1.0, 1.25, 1.5)
    }
    family.add(frozenset(round(k * total / num) for k in range(num)))
    ranked = sorted((cost(member), sorted(member)) for member in family if len(member) == num)
    found = [_descend(frozenset(indices), value, cost, total, rounds) for value, indices in ranked[:starts]]
    return set(min(found, key=lambda pair: pair[1])[0])


def _descend(
    chosen: frozenset[int], best: float, cost: Callable[[frozenset[int]], float], total: int, rounds: int
) -> tuple[frozenset[int], float]:
    for _ in range(rounds):
        before = best
        for index in sorted(chosen - {0}):
            others = chosen - {index}
            low = max((i for i in others if i < index), default=0)
            high = min((i for i in others if i > index), default=total)
            for place in range(low + 1, high):
                value = cost(others | {place})
                if value < best:
                    best, chosen = value, others | {place}
        if best >= before * (1 - 1e-4):
            break
    return chosen, best


def as_rule(computed: set[int], total: int) -> Listed:
    """The schedule as a rule that can stand in a recipe."""
    return Listed(at=tuple(round(i / (total - 1), 4) for i in sorted(computed)))
