"""Networks that are exact: the posterior mean of a Gaussian or of a mixture, and the ends of their trajectories.

They are called as denoisers are, through a `HostCall` on any path, so that methods run on them unchanged in float64. The
condition is the data's mean (it is added to all components of a mixture), which makes guidance linear.

Shapes: B rows of D independent numbers; x [B, D]; tau float64 [B]; encoder_hidden_states [B, D].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from hasten.distill.method import Batch
from hasten.distill.network.host_call import Condition, HostCall
from hasten.distill.network.paths import NoisePath, spread
from hasten.distill.network.roles import Role, Roles
from hasten.pipelines.host import Layout

WIDTH = 3


class Law(ABC):
    """A distribution of data, the same in each number; `mean` [B, D] moves it."""

    @abstractmethod
    def velocity(self, x: Tensor, tau: Tensor, mean: Tensor) -> Tensor:
        """dx / dtau on the circle."""

    @abstractmethod
    def moved(self, x: Tensor, tau: Tensor, rho: Tensor, mean: Tensor) -> Tensor:
        """Where the trajectory through (x, tau) is at rho."""


class Gaussian(Law):
    """N(mean, scale^2). x_tau is N(c mean, c^2 scale^2 + n^2), and trajectories keep their quantile."""

    def __init__(self, scale: float = 0.4) -> None:
        self.scale = scale

    def _deviation(self, tau: Tensor, like: Tensor) -> Tensor:
        return spread(((tau.cos() * self.scale).square() + tau.sin().square()).sqrt(), like)

    def velocity(self, x: Tensor, tau: Tensor, mean: Tensor) -> Tensor:
        c, n = spread(tau.cos(), x), spread(tau.sin(), x)
        apart = (x - c * mean) / self._deviation(tau, x).square()
        return c * n * apart - n * (mean + c * self.scale**2 * apart)

    def moved(self, x: Tensor, tau: Tensor, rho: Tensor, mean: Tensor) -> Tensor:
        quantile = (x - spread(tau.cos(), x) * mean) / self._deviation(tau, x)
        return spread(rho.cos(), x) * mean + self._deviation(rho, x) * quantile


class Mixture(Law):
    """Components of weights `share`, `centres` and one `scale`: not linear, and its map is that of quantiles."""

    def __init__(
        self, share: tuple[float, ...] = (0.3, 0.7), centres: tuple[float, ...] = (-1.2, 0.9), scale: float = 0.25
    ) -> None:
        self.share, self.centres = (torch.tensor(v, dtype=torch.float64) for v in (share, centres))
        self.scale = scale

    def parts(self, tau: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """(centres [B, D, M], deviation [B, 1, 1]) of x_tau's components."""
        c, n = (spread(v, mean)[..., None] for v in (tau.cos(), tau.sin()))
        return c * (mean[..., None] + self.centres), ((c * self.scale).square() + n.square()).sqrt()

    def velocity(self, x: Tensor, tau: Tensor, mean: Tensor) -> Tensor:
        centres, deviation = self.parts(tau, mean)
        apart = (x[..., None] - centres) / deviation
        weights = (self.share.log() - apart.square() / 2).softmax(-1)
        c, n = (spread(v, x)[..., None] for v in (tau.cos(), tau.sin()))
        data = mean[..., None] + self.centres + c * self.scale**2 * apart / deviation
        return (weights * (c * n * apart / deviation - n * data)).sum(-1)

    def cdf(self, x: Tensor, tau: Tensor, mean: Tensor) -> Tensor:
        centres, deviation = self.parts(tau, mean)
        return (self.share * torch.special.ndtr((x[..., None] - centres) / deviation)).sum(-1)

    def moved(self, x: Tensor, tau: Tensor, rho: Tensor, mean: Tensor) -> Tensor:
        found: Tensor = _Quantile.apply(self.cdf(x, tau, mean), rho, mean, self)
        return found


class _Quantile(torch.autograd.Function):
    """x with cdf(x, rho) = u, by halving; its change with u is one over the density."""

    @staticmethod
    def forward(u: Tensor, rho: Tensor, mean: Tensor, law: Mixture) -> Tensor:
        low, high = torch.full_like(u, -20.0), torch.full_like(u, 20.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = law.cdf(middle, rho, mean) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rho, mean, law = inputs
        centres, deviation = law.parts(rho, mean)
        apart = (output[..., None] - centres) / deviation
        density = (law.share * (-apart.square() / 2).exp() / (deviation * math.sqrt(2 * math.pi))).sum(-1)
        ctx.save_for_forward(density)
        ctx.save_for_backward(density)

    @staticmethod
    def jvp(ctx: Any, du: Tensor, *still: Any) -> Tensor:
        return du / ctx.saved_tensors[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient / ctx.saved_tensors[0], None, None, None


class TimestepEmbedding(nn.Module):
    """Where a hint is heard: by its class's name, as in diffusers. time [B, 1] -> [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_2 = nn.Linear(1, width, dtype=torch.float64)

    def forward(self, time: Tensor) -> Tensor:
        return self.linear_2(time)


class Exact(nn.Module):
    """hidden_states [B, D], timestep [B], encoder_hidden_states [B, D] -> the path's output, exact for `law`.

    to: None for the velocity; "end" for the F of which x0 = cos x - sin F is the trajectory's end (an exact consistency
    model); "map" for the U that leads where the hint says. off: a trained number [D] that is added, 0 if exact.
    """

    def __init__(self, law: Law, path: NoisePath, to: str | None = None) -> None:
        super().__init__()
        self.law, self.path, self.to = law, path, to
        self.off = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))
        self.time_embed = TimestepEmbedding(1)
        nn.init.zeros_(self.time_embed.linear_2.weight)
        nn.init.zeros_(self.time_embed.linear_2.bias)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        tau = self.path.angle(timestep)
        distance = self.time_embed(timestep[:, None])[:, 0]
        x, mean = hidden_states / spread(self.path.scale(tau), hidden_states), encoder_hidden_states
        if self.to is None:
            velocity = self.law.velocity(x, tau, mean)
        else:
            far = tau if self.to == "end" else distance
            there = self.law.moved(x, tau, tau - far, mean)
            velocity = (spread(far.cos(), x) * x - there) / spread(far.sin(), x)
            if self.to == "map":  # over no distance, the velocity
                velocity = torch.where(spread(far, x) == 0, self.law.velocity(x, tau, mean), velocity)
        p, q = (spread(factor, x) for factor in self.path.factors(tau))
        return ((velocity + self.off - p * x) / q,)


def role(name: str, network: nn.Module, path: NoisePath) -> Role:
    """A network of D numbers as a role of its own."""
    host = HostCall(network, name, Layout.of(network), {}, path, (WIDTH,), torch.float64, 1.0, None)
    return Role(name, host, None, (), name != "teacher")


def roles(law: Law, path: NoisePath, to: str | None = "end", names: tuple[str, ...] = ("student",)) -> Roles:
    """An exact teacher, and exact roles that are trained."""
    made = Roles(teacher=role("teacher", Exact(law, path).requires_grad_(False), path))
    for name in names:
        made[name] = role(name, Exact(law, path, to), path)
    return made


def batch(rows: int = 7, mean: float = 0.5, seed: int = 0) -> Batch:
    """Rows about a mean of each number; the empty condition is another mean."""
    g = torch.Generator().manual_seed(seed)
    means = mean + 0.3 * torch.randn(rows, WIDTH, generator=g, dtype=torch.float64)
    x0, z = torch.randn(2, rows, WIDTH, generator=g, dtype=torch.float64)
    empty = Condition({"encoder_hidden_states": torch.full((1, WIDTH), -0.4, dtype=torch.float64)})
    return Batch(Condition({"encoder_hidden_states": means}), empty, means + 0.4 * x0, z, (WIDTH,))
