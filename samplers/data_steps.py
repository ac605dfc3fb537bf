"""One step of a solver that is told the data: DDIM, Euler on a flow, and DPM-Solver++(2M), between any two noise levels.

Shapes: x, data [B, ...], of one dtype.
"""

from __future__ import annotations

import math

from torch import Tensor

from hasten.level import Level


def toward(x: Tensor, data: Tensor, now: Level, after: Level, before: tuple[Tensor, Level] | None = None) -> Tensor:
    """x at level `after`, from x at level `now`, where the network says that the data are `data`.

    x_s = (sigma_s / sigma_t) x + (alpha_s - sigma_s alpha_t / sigma_t) D: DPM-Solver++ (arXiv 2211.01095, eq. 9), which at
    first order, D = data, is DDIM and, on a flow, an Euler step. before: data and level of the step before, for the second
    order in two steps (algorithm 2): D = data + (data - data') h / (2 h'), with steps h in lambda = log(alpha / sigma).
    At no noise the answer is D of first order, whatever `before` says.
    """
    if before is not None and after.sigma > 0:
        earlier, level = before
        behind, ahead = now.log_snr - level.log_snr, after.log_snr - now.log_snr
        if behind > 0:
            data = data + (data - earlier) * (ahead / (2 * behind))
    kept = after.sigma / now.sigma
    return x * kept + data * (after.alpha - kept * now.alpha)


def renoised(data: Tensor, noise: Tensor, level: Level) -> Tensor:
    """alpha data + sigma noise."""
    return data * level.alpha + noise * level.sigma


def noise_in(x: Tensor, data: Tensor, level: Level) -> Tensor:
    """The noise that x has at `level`, if its data are `data`; x itself where there are no data in it."""
    return (x - data * level.alpha) / level.sigma


def ratio(level: Level) -> float:
    """sigma / alpha; infinite where there is no signal."""
    return level.sigma / level.alpha if level.alpha > 0 else math.inf
