"""Time travel on an unmodified pipeline: its scheduler is told to go back, and the pipeline walks a longer list of times.

Shapes: x [B, ...] the latents; n levels, m >= n evaluations.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RefusedError
from hasten.pipelines.seams.few_calls import generators
from hasten.samplers.travel import Shares, TimeTravel, noisier
from hasten.scheduler import is_flow


def travelling(scheduler: Any, travel: TimeTravel) -> Any:
    """Give a DPM-Solver scheduler, which is nobody else's, the travels of `travel`.

    Its fresh noise is, row by row, a function of the latents that the run starts from, so that a seed decides the result.
    A run that does not start at all noise (image to image) raises `RefusedError`.
    """
    journey = _Journey(scheduler, travel)

    @functools.wraps(journey.given)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        journey.begin(*args, **kwargs)

    @functools.wraps(journey.plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        return journey.step(*args, **kwargs)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    return scheduler


class _Journey:
    """State of one run: where in the plan it stands, and the noise of its rows.

    While the pipeline looks, the scheduler's times and sigmas are those of the m evaluations; while it steps, the n levels.
    """

    def __init__(self, scheduler: Any, travel: TimeTravel) -> None:
        self.scheduler, self.travel = scheduler, travel
        self.given, self.plain = scheduler.set_timesteps, scheduler.step
        self.plan: list[int] = []
        self.place = 0
        self.noise: list[torch.Generator] = []
        self.levels: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self.shown = self.levels

    def begin(self, *args: Any, **kwargs: Any) -> None:
        scheduler = self.scheduler
        self.given(*args, **kwargs)
        self.plan, self.place = self.travel.plan(len(scheduler.timesteps)), 0
        self.levels = (scheduler.timesteps, scheduler.sigmas)
        at = torch.tensor(self.plan)
        times, sigmas = scheduler.timesteps[at.to(scheduler.timesteps.device)], scheduler.sigmas[at]
        self.shown = (times, torch.cat([sigmas, scheduler.sigmas[-1:]]))
        scheduler.timesteps, scheduler.sigmas = self.shown

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        scheduler, here = self.scheduler, self.plan[self.place]
        if scheduler.begin_index:
            raise RefusedError("Time travel starts at all noise, and this run starts in the middle. Leave it out for image to image.")
        if self.place == 0:
            self.noise = generators(sample)
        scheduler.timesteps, scheduler.sigmas = self.levels
        scheduler._step_index = here
        try:
            result = self.plain(model_output, timestep, sample, *args, **kwargs)
        finally:
            scheduler.timesteps, scheduler.sigmas = self.shown
        self.place += 1
        if self.place == len(self.plan) or self.plan[self.place] > here:
            return result
        scheduler.lower_order_nums = 0  # what was evaluated before belongs to another path
        x = self._back(result[0] if isinstance(result, tuple) else result.prev_sample, here + 1, self.plan[self.place])
        return (x, *result[1:]) if isinstance(result, tuple) else type(result)(prev_sample=x)

    def _back(self, x: Tensor, s: int, t: int) -> Tensor:
        """x [B, ...] at level s with fresh noise, at the noisier level t."""
        drawn = torch.stack([torch.randn(x.shape[1:], generator=row) for row in self.noise]).to(x.device)
        sigmas = self.levels[1]
        return noisier(x, alpha_sigma(self.scheduler, float(sigmas[s])), alpha_sigma(self.scheduler, float(sigmas[t])), drawn)


def alpha_sigma(scheduler: Any, sigma: float) -> Shares:
    """alpha and sigma of a level that a DPM-Solver scheduler knows as `sigma`: noise over signal, except in a flow."""
    if is_flow(scheduler):
        return 1 - sigma, sigma
    alpha = 1 / math.sqrt(1 + sigma**2)
    return alpha, sigma * alpha
