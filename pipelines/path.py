"""Recording the path of a run: what the latents and the data in them were at every noise level."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RefusedError
from hasten.samplers.sequence import Recorded
from hasten.scheduler import is_flow, solver_levels, solver_times
from hasten.session import Attachment


@contextlib.contextmanager
def record_path(scheduler: Any) -> Iterator[list[Recorded]]:
    """Record every whole run of `scheduler` while open; a batch of B rows is B runs.

    Raises `RefusedError` for solvers that evaluate twice at one level, or that do not say what their network predicts.
    """
    found: list[Recorded] = []
    latents: list[Tensor] = []
    data: list[Tensor] = []
    attachment, plain = Attachment(), scheduler.step

    def stepped(output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        first = scheduler.step_index in (None, 0) if hasattr(scheduler, "step_index") else not latents
        if first or len(latents) >= len(scheduler.timesteps):
            latents.clear()
            data.clear()
        index = len(latents)
        times = solver_times(scheduler)
        levels = solver_levels(scheduler, times, flow=is_flow(scheduler))
        level = levels[index]
        if len(set(times)) < len(times) or level is None or level.data is None:
            raise RefusedError(
                f"The run of a {type(scheduler).__name__} cannot be recorded: it evaluates twice at one level, or does not say"
                " what its network predicts. Record with DDIM, DPM-Solver++ or FlowMatchEuler."
            )
        x = _unscaled(scheduler, sample, level.alpha)
        a, b = level.data
        latents.append(x)
        data.append(a * x + b * output.detach().double())
        result = plain(output, timestep, sample, *args, **kwargs)
        if len(latents) == len(times):
            end = result[0] if isinstance(result, tuple) else result.prev_sample
            shares = times if is_flow(scheduler) else _shares(scheduler)
            # A flow's solver of several orders begins a hair below all noise.
            shares = [1.0, *shares[1:]]
            found.extend(_row(levels, shares, [*latents, end.detach().double()], data, row) for row in range(len(end)))
        return result

    attachment.replace(scheduler, "step", functools.wraps(plain)(stepped))
    try:
        yield found
    finally:
        attachment.restore()


def _unscaled(scheduler: Any, sample: Tensor, alpha: float) -> Tensor:
    """The latents as the network sees them: solvers on sigma carry them over alpha."""
    x = sample.detach().double()
    on_sigma = hasattr(scheduler, "scale_model_input") and "Euler" in type(scheduler).__name__ and not is_flow(scheduler)
    return x * alpha if on_sigma else x


def _shares(scheduler: Any) -> list[float]:
    trained = scheduler.config.num_train_timesteps
    return [(float(t) + 1) / trained for t in scheduler.timesteps]


def _row(levels: Any, shares: list[float], latents: list[Tensor], data: list[Tensor], row: int) -> Recorded:
    values = torch.stack([x[row].flatten() for x in (*latents, *data)])
    return Recorded(list(levels), shares, values @ values.T, values.shape[1])
