"""Which noise levels a scheduler of diffusers walks: those of a `Solver`, written where the scheduler reads them.

diffusers' solvers choose levels in ways that disagree with each other (DDIM and PNDM step by T // n wherever their levels are;
DPM++ mixes a variance-preserving table into the karras levels of a flow), so that levels that hasten chooses are written
after the scheduler's own `set_timesteps` has put everything else back to the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from hasten.errors import UsageError
from hasten.samplers.levels import SHARES, between, shares, shifted
from hasten.samplers.solver import Solver
from hasten.scheduler import is_flow

HIGHEST = 1 - 1e-6
"""A flow's solvers of several orders take log(1 - sigma), which all noise has none of; diffusers' UniPC starts here, too."""


def told(scheduler: Any, host: Any, solver: Solver) -> Callable[..., None]:
    """Its `set_timesteps` for pipelines that tell a list of sigmas, which it walks as the host would, shift and all."""
    original = scheduler.set_timesteps

    def set_timesteps(
        num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        original(len(sigmas) if sigmas is not None else num_inference_steps, device=device)
        if sigmas is not None:
            shift = _shift(host.config, solver, mu if host.config.get("use_dynamic_shifting") else None)
            levels = [shifted(float(u), shift) for u in sigmas]
            _write(scheduler, [sigma * scheduler.config.num_train_timesteps for sigma in levels], levels)

    return set_timesteps


def pinned(
    scheduler: Any, host: Any, solver: Solver, *, n: int | None = None, start: int = 0, stop: int | None = None, straight: bool = False
) -> Callable[..., None]:
    """Its `set_timesteps` with the solver's levels, whatever its caller asks for.

    n: how many there are, None for what is asked for. start, stop: it walks from one of them to the other, n (None) being no
    noise. straight: in one step.
    """
    given = scheduler.set_timesteps

    def set_timesteps(
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        asked = next((len(levels) for levels in (timesteps, sigmas) if levels is not None), num_inference_steps)
        if not asked or asked < 1:
            raise UsageError(f"A run needs at least one step, got {asked}.")
        count = n or (len(solver.times) if solver.times else max(1, round(asked * solver.steps)))
        found = _flow_levels(scheduler, host, solver, count, mu) if is_flow(scheduler) else _levels(scheduler, solver, count)
        times, sigmas = found
        end = count if stop is None else stop
        part = slice(start, start + 1 if straight else end)
        given(num_inference_steps=len(times[part]), device=device)
        _write(scheduler, times[part], sigmas[part], sigmas[end] if end < count else None)

    return set_timesteps


def _flow_levels(scheduler: Any, host: Any, solver: Solver, n: int, mu: float | None) -> tuple[list[float], list[float]]:
    """(times, sigmas) of n evaluations."""
    trained = scheduler.config.num_train_timesteps
    shift = _shift(host.config, solver, mu if host.config.get("use_dynamic_shifting") else None)
    smallest = 1 / trained
    if solver.times is not None:
        sigmas = list(solver.times)
    elif solver.spacing in SHARES:
        sigmas = [shifted(u, shift) for u in shares(solver.spacing, n, smallest)]  # type: ignore[arg-type]
    else:
        sigmas = between(solver.spacing, n, 1.0, shifted(smallest, shift))  # type: ignore[arg-type]
    if "solver_order" in scheduler.config:
        sigmas[0] = min(sigmas[0], HIGHEST)
    return [sigma * trained for sigma in sigmas], sigmas


def _shift(config: Any, solver: Solver, mu: float | None) -> float:
    """The shift of a flow. mu: what a pipeline works out from the size, log(shift) or the shift itself; None for the host's."""
    if solver.shift is not None:
        return solver.shift
    if mu is not None:
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return float(config.get("shift", config.get("flow_shift", 1.0)))


def _levels(scheduler: Any, solver: Solver, n: int) -> tuple[list[float], list[float]]:
    """(times, noise over signal) of n evaluations; times between the trained whole ones are read between their logarithms."""
    trained = scheduler.config.num_train_timesteps
    cumulative = scheduler.alphas_cumprod.double()
    table = (0.5 * ((1 - cumulative).log() - cumulative.log())).tolist()
    if solver.times is not None or solver.spacing in SHARES:
        u = list(solver.times or shares(solver.spacing, n, 1 / trained))  # type: ignore[arg-type]
        if u[-1] * trained < 1 - 1e-6:
            raise UsageError(f"sampler.times ends at {u[-1]:g}; the least noise of this model is at 1 / {trained}.")
        times = [max(0.0, share * trained - 1) for share in u]
    else:
        wanted = between(solver.spacing, n, math.exp(table[-1]), math.exp(table[0]))  # type: ignore[arg-type]
        times = [_between(table, range(trained), math.log(sigma)) for sigma in wanted]
    return times, [math.exp(_between(range(trained), table, time)) for time in times]


def _between(knots: Any, values: Any, at: float) -> float:
    """The value at `at` on straight lines through (knots, values); knots rise."""
    low, high = 0, len(knots) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if knots[middle] <= at else (low, middle)
    place = min(max((at - knots[low]) / (knots[high] - knots[low]), 0.0), 1.0)
    return float(values[low] + place * (values[high] - values[low]))


def _write(scheduler: Any, times: list[float], sigmas: list[float], last: float | None = None) -> None:
    """Put the levels where diffusers' solvers read them; those that evaluate twice per step have the inner ones twice.

    last: the level that the last step goes to, None for the end of the run.
    """
    stops = scheduler.config.get("final_sigmas_type") == "sigma_min" and not is_flow(scheduler)
    end = float(_smallest(scheduler)) if stops else 0.0
    levels = [*sigmas, end if last is None else last]
    if "Heun" in type(scheduler).__name__:
        levels = [levels[0], *(sigma for sigma in levels[1:-1] for _ in range(2)), levels[-1]]
        times = [times[0], *(time for time in times[1:] for _ in range(2))]
    device = scheduler.timesteps.device
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float32, device=scheduler.sigmas.device)
    scheduler.timesteps = torch.tensor(times, dtype=torch.float32, device=device)


def _smallest(scheduler: Any) -> Any:
    """Noise over signal of the least noise that was trained on."""
    least = scheduler.alphas_cumprod[0]
    return ((1 - least) / least).sqrt()
