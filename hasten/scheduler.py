"""What a scheduler says of each evaluation of a run: where in time it stands, how noisy its input is, what it counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.level import SMALLEST, Level


def solver_times(scheduler: Any) -> list[float]:
    """`Step.time` of each evaluation: sigma for flow matching, atan(sigma / alpha) / (pi / 2) for
    variance-preserving and variance-exploding solvers, else the timestep over its largest value.
    Solvers whose timesteps are not indices (Stable Video Diffusion's are log sigma / 4) are read by sigma."""
    steps = [float(t) for t in torch.as_tensor(scheduler.timesteps).flatten().tolist()]
    sigmas = _sigmas(scheduler, len(steps))
    if is_flow(scheduler) and sigmas is not None:
        return sigmas
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if cumulative is not None and 0 <= min(steps, default=0) and max(steps, default=0) <= len(cumulative):
        levels = [_level(cumulative, t) for t in steps]
        return [math.atan2(math.sqrt(1 - a), math.sqrt(a)) / (math.pi / 2) for a in levels]
    if sigmas is not None:
        return [math.atan(s) / (math.pi / 2) for s in sigmas]
    top = max(steps, default=1.0) or 1.0
    return [t / top for t in steps]


def solver_weights(scheduler: Any) -> list[float | None]:
    """`Step.weight` of each evaluation: the factor with which the output enters the latents, where the
    solver is first-order and linear in it (Euler on a flow, Euler on sigma, DDIM with eta 0)."""
    name, num = type(scheduler).__name__, len(scheduler.timesteps)
    config = getattr(scheduler, "config", {})
    prediction = config.get("prediction_type", "epsilon")
    if name == "FlowMatchEulerDiscreteScheduler" and not config.get("stochastic_sampling"):
        sigmas = scheduler.sigmas.tolist()
        return [sigmas[i + 1] - sigmas[i] for i in range(num)]
    if name == "EulerDiscreteScheduler" and prediction == "epsilon":
        sigmas = scheduler.sigmas.tolist()
        return [sigmas[i + 1] - sigmas[i] for i in range(num)]
    clipped = config.get("clip_sample") or config.get("thresholding")
    if name == "DDIMScheduler" and prediction == "epsilon" and not clipped:
        # DDIM steps to t - T // n, which is the next timestep only with "leading" spacing.
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        now = [_level(scheduler.alphas_cumprod, float(t)) for t in scheduler.timesteps]
        after = [
            float(scheduler.alphas_cumprod[int(t) - stride] if t >= stride else scheduler.final_alpha_cumprod)
            for t in scheduler.timesteps.tolist()
        ]
        return [math.sqrt((1 - b) / b) - math.sqrt((1 - a) / a) for a, b in zip(now, after, strict=True)]
    return [None] * num


def solver_levels(scheduler: Any, times: Sequence[float], *, flow: bool) -> list[Level | None]:
    """`Step.level` of each evaluation, from `Step.time`; None where the solver has no noise levels at all.

    A network that is given x / sqrt(1 + sigma^2) by its solver (Euler on sigma) sees a variance-preserving input.
    """
    config = getattr(scheduler, "config", {})
    if flow:
        # Flow solvers may be told to expect another prediction; then nobody can say what the output means.
        known = "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction"
        return [Level(1 - t, t, (1.0, -t) if known and t >= SMALLEST else None) for t in times]
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if cumulative is None and getattr(scheduler, "sigmas", None) is None:
        return [None] * len(times)
    prediction = config.get("prediction_type", "epsilon") if cumulative is not None else None
    return [_variance_preserving(t * math.pi / 2, prediction) for t in times]


def _variance_preserving(angle: float, prediction: str | None) -> Level:
    alpha, sigma = math.cos(angle), math.sin(angle)
    data = None
    if prediction == "epsilon" and alpha >= SMALLEST and sigma >= SMALLEST:
        data = (1 / alpha, -sigma / alpha)
    elif prediction == "v_prediction" and sigma >= SMALLEST:
        data = (alpha, -sigma)
    elif prediction == "sample":
        data = (0.0, 1.0)
    return Level(alpha, sigma, data)


def is_flow(scheduler: Any) -> bool:
    """Does it solve a flow (x = (1 - t) data + t noise)?"""
    config = getattr(scheduler, "config", {})
    named = "FlowMatch" in type(scheduler).__name__
    return bool(named or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction")


def _sigmas(scheduler: Any, num: int) -> list[float] | None:
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) < num:
        return None
    return [float(s) for s in torch.as_tensor(sigmas).flatten().tolist()[:num]]


def _level(cumulative: Tensor, t: float) -> float:
    """alpha_cumprod at a possibly fractional timestep."""
    low = min(max(math.floor(t), 0), len(cumulative) - 1)
    high = min(low + 1, len(cumulative) - 1)
    return float(cumulative[low]) * (1 - (t - low)) + float(cumulative[high]) * (t - low)
