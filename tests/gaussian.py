"""A problem whose path is known: data drawn from N(MEAN, SPREAD^2), for any scheduler of diffusers.

Under x = alpha data + sigma noise, x ~ N(alpha MEAN, alpha^2 SPREAD^2 + sigma^2), so that the best prediction is linear in x
and (x - alpha MEAN) / sqrt(alpha^2 SPREAD^2 + sigma^2) is constant along the path of the ODE.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hasten.scheduler import is_flow

MEAN, SPREAD = 0.4, 0.3


def alpha_sigma(scheduler: Any, time: float) -> tuple[float, float]:
    """Shares of data and noise at one of the scheduler's times (between whole times: straight in the logarithm)."""
    if is_flow(scheduler):
        sigma = time / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    cumulative = scheduler.alphas_cumprod.double()
    table = 0.5 * ((1 - cumulative).log() - cumulative.log())
    low = min(int(time), len(table) - 2)
    ratio = math.exp(float(table[low] + (time - low) * (table[low + 1] - table[low])))
    alpha = 1 / math.sqrt(1 + ratio**2)
    return alpha, ratio * alpha


def predict(scheduler: Any, x: Tensor, time: float) -> Tensor:
    """What a perfect network answers: the flow's velocity, or the noise."""
    alpha, sigma = alpha_sigma(scheduler, time)
    var = (alpha * SPREAD) ** 2 + sigma**2
    noise = sigma * (x - alpha * MEAN) / var
    data = MEAN + alpha * SPREAD**2 * (x - alpha * MEAN) / var
    return noise - data if is_flow(scheduler) else noise


def walk(scheduler: Any, z: Tensor, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """(where the solver gets to from the path's start of z, where the exact path is), before evaluation `stop` or at the end.

    The scheduler's timesteps are set. Solvers on sigma see x over sqrt(1 + sigma^2), as networks do.
    """
    times = scheduler.timesteps.tolist()
    scaled = hasattr(scheduler, "scale_model_input") and float(scheduler.init_noise_sigma) > 1

    def at(time: float) -> Tensor:
        alpha, sigma = alpha_sigma(scheduler, time)
        x = alpha * MEAN + math.sqrt((alpha * SPREAD) ** 2 + sigma**2) * z
        return x / alpha if scaled else x

    x = at(times[0])
    for index, t in enumerate(scheduler.timesteps):
        if index == stop:
            return x, at(times[index])
        given = scheduler.scale_model_input(x, t) if scaled else x
        x = scheduler.step(predict(scheduler, given, float(t)), t, x, return_dict=False)[0]
    return x, MEAN + SPREAD * z


def error(scheduler: Any, stop: int | None = None) -> float:
    """Largest distance from the exact path for starts within three deviations."""
    z = torch.linspace(-3, 3, 7, dtype=torch.float64).reshape(7, 1, 1, 1)
    found, exact = walk(scheduler, z, stop)
    return float((found - exact).abs().max())
