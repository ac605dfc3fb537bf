"""How noisy a step's input is, and what the network's output says about the clean data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SMALLEST = 1e-4
"""Shares of data and of noise below this are not told from it: keeps logarithms and quotients finite."""


@dataclass(frozen=True, slots=True)
class Level:
    """The network's input is x = alpha * data + sigma * noise; data is estimated as a x + b y, y its output.

    alpha, sigma: >= 0, no units. data: (a, b), or None where the solver does not say what its network predicts.
    Flow matching (y = noise - data): alpha = 1 - sigma, (1, -sigma). Variance preserving: noise prediction
    (1 / alpha, -sigma / alpha), v-prediction (alpha, -sigma), data prediction (0, 1).
    """

    alpha: float
    sigma: float
    data: tuple[float, float] | None = None

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio; the coordinate of DPM-Solver."""
        return math.log(max(self.alpha, SMALLEST) / max(self.sigma, SMALLEST))

    @property
    def angle(self) -> float:
        """atan(sigma / alpha) in [0, pi / 2]: where the input stands on the way from data to noise."""
        return math.atan2(self.sigma, self.alpha)

    @property
    def velocity(self) -> tuple[float, float] | None:
        """(a, b) with d(x / r)/d(angle) = a x + b y along the exact path, r = sqrt(alpha^2 + sigma^2).

        On the unit circle every noise schedule is the same rotation, so this is v-prediction whatever the network
        predicts. None where `data` is, and where there is no noise left.
        """
        if self.data is None or self.sigma < SMALLEST:
            return None
        r, (a, b) = math.hypot(self.alpha, self.sigma), self.data
        return (self.alpha / r - r * a) / self.sigma, -r * b / self.sigma


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
