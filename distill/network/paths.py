"""Noise paths in one coordinate: every teacher becomes a network on the circle.

A host's network takes x = alpha x0 + sigma z at a time t of its own and predicts one of four things. Here its input
is divided by r = sqrt(alpha^2 + sigma^2) and its time is the angle tau = atan2(sigma, alpha), so that

    x_tau = cos(tau) x0 + sin(tau) z,    F = dx_tau / dtau = cos(tau) z - sin(tau) x0
    x0 = cos(tau) x - sin(tau) F,        z = sin(tau) x + cos(tau) F

for flow matching and variance-preserving diffusion alike (TrigFlow with unit data, arXiv 2410.11081, section 3; the
change from flow matching: SANA-Sprint, arXiv 2503.09641, section 3.2). Losses are written for F alone.

Shapes: B rows; x and outputs [B, ...]; tau, t, alpha, sigma float64 [B], tau in [0, pi / 2] radians. Factors are
computed in float64 and cast to x's dtype last.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.errors import ModelError, UsageError

Output = Literal["flow", "epsilon", "v_prediction", "sample"]
"""What a network predicts: z - x0; z; alpha z - sigma x0; x0. diffusers' names but for the first."""

HALF_TURN = math.pi / 2
"""The angle of pure noise."""

LEAST_SIGNAL = 0.068
"""The least alpha at which a network that predicts noise is asked for data: where Stable Diffusion's table ends. x0 = (x -
sigma eps) / alpha multiplies what it gets wrong by 15 there; at the end of a linear table (0.0064) by 156."""


def spread(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] in the dtype and on the device of `like` [B, ...]."""
    return values.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def turned(x: Tensor, velocity: Tensor, angle: Tensor) -> Tensor:
    """Where x is `angle` (float64 [B]) radians nearer to the data if x0 and z stay what they are: cos x - sin F. A DDIM
    step, and at `angle` = tau the data themselves."""
    return spread(angle.cos(), x) * x - spread(angle.sin(), x) * velocity


class NoisePath(ABC):
    """How noisy the input of a network is at its time t, and what its output means."""

    def __init__(self, output: Output) -> None:
        self.output = output

    @abstractmethod
    def levels(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the network's input at these angles."""

    @abstractmethod
    def time(self, tau: Tensor) -> Tensor:
        """The time the network is told at these angles."""

    @abstractmethod
    def angle(self, time: Tensor) -> Tensor:
        """The angle at these times of the network."""

    @property
    def start(self) -> float:
        """The angle that a network is told with pure noise, when it is to make data of it at once."""
        return HALF_TURN

    def nearest(self, time: Tensor) -> Tensor:
        """The nearest times at which the network may be asked in other programs: any, but for whole ones of a table."""
        return time

    def scale(self, tau: Tensor) -> Tensor:
        """r: the network's input is r times the point on the circle."""
        alpha, sigma = self.levels(tau)
        return (alpha.square() + sigma.square()).sqrt()

    def factors(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) with F = p x + q y for a point x on the circle and the network's output y.

        Flow matching: (alpha - sigma, r). Noise: (-tan, 1 / cos); it cannot be had at pure noise, where a noise
        predictor says nothing about the data. v-prediction: (0, 1). Data: (cot, -1 / sin); not at tau = 0.
        """
        alpha, sigma = self.levels(tau)
        r = (alpha.square() + sigma.square()).sqrt()
        if self.output == "flow":
            return alpha - sigma, r
        cos, sin = tau.cos(), tau.sin()
        if self.output == "epsilon":
            return -sin / cos, 1 / cos
        if self.output == "v_prediction":
            return torch.zeros_like(tau), torch.ones_like(tau)
        return cos / sin, -1 / sin


class Flow(NoisePath):
    """Flow matching: alpha = 1 - sigma. unit: the network's time at sigma = 1 (1000 for most, 1 for Flux)."""

    def __init__(self, unit: float = 1000.0) -> None:
        super().__init__("flow")
        self.unit = unit

    def levels(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._sigma(tau)
        return 1 - sigma, sigma

    def time(self, tau: Tensor) -> Tensor:
        return self._sigma(tau) * self.unit

    def angle(self, time: Tensor) -> Tensor:
        sigma = time.double() / self.unit
        return torch.atan2(sigma, 1 - sigma)

    def _sigma(self, tau: Tensor) -> Tensor:
        tau = tau.double()
        return tau.sin() / (tau.sin() + tau.cos())


class VariancePreserving(NoisePath):
    """alpha^2 + sigma^2 = 1, given by its table of alpha_bar = alpha^2 at the times 0, 1, ... of the network.

    Between the times of the table the angle is linear, and tau = 0 is one time before the first. `end` is the largest
    angle that the table has.
    """

    def __init__(self, alphas_cumprod: Tensor | Sequence[float], output: Output = "epsilon") -> None:
        if output == "flow":
            raise ModelError("A variance-preserving network cannot predict noise - data; see prediction_type.")
        super().__init__(output)
        alpha_bar = torch.as_tensor(alphas_cumprod).double().cpu()
        angles = torch.atan2((1 - alpha_bar).clamp(min=0).sqrt(), alpha_bar.sqrt())
        self.table = torch.cat([angles.new_zeros(1), angles])
        if not bool((self.table.diff() > 0).all()):
            raise ModelError("alphas_cumprod must fall from time to time; this scheduler's table does not.")
        self.end = float(self.table[-1])

    def levels(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        tau = self._inside(tau)
        return tau.cos(), tau.sin()

    def time(self, tau: Tensor) -> Tensor:
        tau = self._inside(tau)
        table = self.table.to(tau.device)
        above = torch.searchsorted(table, tau.contiguous()).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return (above - 2) + (tau - low) / (high - low)

    @property
    def start(self) -> float:
        if self.output != "epsilon":
            return self.end
        clear = self.table[self.table.cos() >= LEAST_SIGNAL]
        return float(clear[-1])

    def nearest(self, time: Tensor) -> Tensor:
        return time.round()

    def angle(self, time: Tensor) -> Tensor:
        time = time.double()
        table = self.table.to(time.device)
        below = (time + 1).floor().clamp(0, len(table) - 2).long()
        return torch.lerp(table[below], table[below + 1], time + 1 - below)

    def _inside(self, tau: Tensor) -> Tensor:
        return tau.double().clamp(max=self.end)


def path_of(scheduler: Any, unit: float) -> NoisePath:
    """The path of a diffusers scheduler. unit: what the network is told at the scheduler's last time, over 1000.

    Raises `ModelError` where the scheduler does not say what its network predicts.
    """
    config = scheduler.config
    kind = config.get("prediction_type", "flow_prediction" if "FlowMatch" in type(scheduler).__name__ else None)
    if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas") or kind == "flow_prediction":
        return Flow(unit)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or kind not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(
            f"{type(scheduler).__name__} with prediction_type = {kind!r} does not say what its network predicts; needed:"
            " a flow-matching scheduler, or alphas_cumprod with prediction_type epsilon, v_prediction or sample."
        )
    if unit != 1000.0:
        raise ModelError(f"A discrete network told {unit:g} at time 1000 is not known. Expected its own times 0 to 999.")
    return VariancePreserving(table, kind)


def guided(unconditional: Tensor, conditional: Tensor, s: Tensor | float) -> Tensor:
    """Classifier-free guidance u + s (c - u), the one convention of hasten: s = 1 is the conditional prediction."""
    scale = spread(s, conditional) if isinstance(s, Tensor) else s
    return unconditional + scale * (conditional - unconditional)


def scale_from(value: float, convention: str) -> float:
    """A guidance scale written elsewhere, in hasten's convention.

    `u+s(c-u)`: DMD2, FastGen, LightX2V, SANA, diffusers' guidance_scale. `c+w(c-u)`: LCM's w (what is embedded),
    Self-Forcing, CausVid and early FastVideo. `(1+w)c-wu` is the same as the last, as Ho and Salimans write it.
    `u+w/(1-w)...` weights in [0, 1): `mix`, c's share is 1 / (1 - w).
    """
    known = {"u+s(c-u)": value, "c+w(c-u)": 1 + value, "(1+w)c-wu": 1 + value}
    if convention == "mix":
        if not 0 <= value < 1:
            raise UsageError(f"A share of guidance must be in [0, 1), got {value}.")
        return 1 / (1 - value)
    if convention not in known:
        raise UsageError(f"Guidance convention {convention!r} is unknown; allowed: {', '.join([*known, 'mix'])}.")
    return known[convention]
