"""Residual shifting: restoration by a short chain from the degraded picture to the clean one.

Shapes: x0 the clean picture, y the degraded one at its size, x_t the state, noise: all [B, ...] of one dtype; the numbers
eta_t are float64 on the host. t counts from 1 (nearly clean) to T (nearly y).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hasten.errors import UsageError


@dataclass(frozen=True)
class ResidualShift:
    """The chain of ResShift (arXiv 2307.12348): x_t = x0 + eta_t (y - x0) + kappa sqrt(eta_t) noise (eq. 2).

    steps: T; power: p, below 1 for a chain that leaves x0 slowly; kappa: how much noise; last: eta_T. 15, 0.3, 2 and 0.999
    are the paper's, for latents of about unit scale. eta_1 is the smaller of 0.001 and (0.04 / kappa)^2, between them
    sqrt(eta) grows geometrically with the exponent ((t - 1) / (T - 1))^p (eqs. 10 and 11).
    Raises `UsageError` for numbers that make no chain.
    """

    steps: int = 15
    power: float = 0.3
    kappa: float = 2.0
    last: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 2 or self.power <= 0 or self.kappa <= 0 or not self.first < self.last <= 1:
            raise UsageError(
                f"Residual shifting needs steps of 2 or more, power and kappa above 0 and {self.first:.3g} < last <= 1, got"
                f" steps {self.steps}, power {self.power:g}, kappa {self.kappa:g}, last {self.last:g}."
            )

    @property
    def first(self) -> float:
        """eta_1: so little noise that the first state is the clean picture to the eye."""
        return min(0.001, (0.04 / max(self.kappa, 1e-12)) ** 2)

    @cached_property
    def eta(self) -> tuple[float, ...]:
        """eta_0 = 0, eta_1, ..., eta_T."""
        spans = self.steps - 1
        places = [(i / spans) ** self.power for i in range(self.steps)]
        return (0.0, *(self.first * (self.last / self.first) ** place for place in places))

    def spread(self, t: int) -> float:
        """kappa sqrt(eta_t): standard deviation of the noise in x_t."""
        return self.kappa * math.sqrt(self.eta[t])

    def forward(self, x0: Tensor, y: Tensor, noise: Tensor, t: int) -> Tensor:
        """x_t."""
        return x0 + self.eta[t] * (y - x0) + self.spread(t) * noise

    def back(self, t: int, s: int) -> tuple[float, float, float]:
        """(a, b, d) with x_s = a x_t + b x0 + d noise: the posterior of x_s given x_t and x0 (eq. 7), for any s < t.

        a = eta_s / eta_t, b = 1 - a, d^2 = kappa^2 eta_s b. Steps of the chain may be left out: what lies between s and t is
        one longer step of it, with alpha = eta_t - eta_s.
        """
        if not 0 <= s < t <= self.steps:
            raise UsageError(f"Going back from t = {t} to s = {s} needs 0 <= s < t <= {self.steps}.")
        a = self.eta[s] / self.eta[t]
        return a, 1 - a, self.kappa * math.sqrt(self.eta[s] * (1 - a))

    def times(self, steps: int) -> tuple[int, ...]:
        """T, ..., 0 in `steps` steps, as even as whole numbers go. Raises `UsageError` for more steps than the chain has."""
        if not 1 <= steps <= self.steps:
            raise UsageError(f"This chain has {self.steps} steps, and {steps} were asked for; ask for 1 to {self.steps}.")
        return tuple(round(self.steps * (steps - i) / steps) for i in range(steps + 1))
