"""A signal that asks the solver's path, not the network: is the trajectory getting straighter?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hasten.caching.signals import Signal, SignalState
from hasten.forecast import combine
from hasten.forecast_adams import adams_bashforth
from hasten.step import Step

NODES = 3
"""Computed values that a third-order Adams-Bashforth step and a second difference need."""


class Stability(Signal):
    """Cosine between the solver's deviation from a third-order step and the second difference of the velocity.

    SADA (arXiv 2507.17135): the step is stable, and may be skipped, where (x - x^) . D2 y < 0, with y = dx/dt at the
    computed steps, x the latents the solver arrived at, and x^ where a third-order extrapolation of y would have led.
    For a first-order solver x - x^ is about -dy/dt h^2 / 2: the criterion holds while the bend of the path shrinks.

    Differs: x^ is the Adams-Bashforth step on the real, irregular grid (exact where y is quadratic) in place of fixed
    coefficients; path and velocity are taken on the unit circle (`Level.velocity`), so that every prediction type and
    noise schedule is the same equation; the product is divided by both norms, which leaves its sign.

    Signed: goes with `Drift(limit=0, accumulate=False)`. Unknown, so computed, before `NODES` computed values, and
    where the solver does not say what the network predicts. Holds four tensors of the latents' size.
    """

    kind: ClassVar[str] = "stability"
    signed: ClassVar[bool] = True

    def start(self) -> SignalState:
        return _Stability()


class _Stability:
    def __init__(self) -> None:
        self.previous: tuple[float, Tensor] | None = None
        self.nodes: list[float] = []
        self.velocities: list[Tensor] = []

    def measure(self, step: Step, x: Tensor) -> Tensor | None:
        if step.level is None:
            return None
        here = step.level.angle
        unit = x.float() / (step.level.alpha**2 + step.level.sigma**2) ** 0.5
        previous, self.previous = self.previous, (here, unit)
        if previous is None or previous[1].shape != x.shape or len(self.nodes) < NODES or previous[0] == here:
            return None
        if self.velocities[0].shape != x.shape:
            return None
        reached = previous[1] + combine(adams_bashforth(self.nodes, previous[0], here), self.velocities)
        bend = combine(second_difference(self.nodes), self.velocities)
        off = unit - reached
        cosine: Tensor = torch.dot(off.flatten(), bend.flatten()) / (off.norm() * bend.norm()).clamp_min(1e-20)
        return cosine

    def observe(self, step: Step, x: Tensor, y: Tensor) -> None:
        if y.shape != x.shape:  # networks that also return a variance
            y = y[:, : x.shape[1]]
        coefficients = step.level.velocity if step.level is not None else None
        if step.level is None or coefficients is None or y.shape != x.shape:
            self.nodes, self.velocities = [], []
            return
        velocity = combine(list(coefficients), [x.float(), y.float()])
        if step.level.angle in self.nodes:  # Heun-type solvers evaluate one time twice
            spot = self.nodes.index(step.level.angle)
            del self.nodes[spot], self.velocities[spot]
        if self.velocities and self.velocities[0].shape != velocity.shape:
            self.nodes, self.velocities = [], []
        self.nodes = [*self.nodes, step.level.angle][-NODES:]
        self.velocities = [*self.velocities, velocity][-NODES:]

    def tensors(self) -> list[Tensor]:
        return self.velocities + ([self.previous[1]] if self.previous is not None else [])


def second_difference(nodes: list[float]) -> list[float]:
    """Weights of the second derivative of the parabola through three nodes."""
    a, b, c = nodes
    return [2 / ((a - b) * (a - c)), 2 / ((b - a) * (b - c)), 2 / ((c - a) * (c - b))]
