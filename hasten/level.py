"""How noisy a step's input is, and what the network's output says about the clean data."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
