"""Sampling with few calls: what a student is trained for, and how anybody samples it afterwards.

Shapes: B rows; x [B, ...] on the circle; K calls at the angles tau_1 > ... > tau_K > 0, radians.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from hasten.distill.network.hint import FlowMap, Hinted
from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import NoisePath, spread
from hasten.distill.network.quantised import Quantised
from hasten.distill.network.roles import Guided, Role
from hasten.errors import UsageError

How = Literal["consistency", "ode", "map"]
"""`consistency`: to the data, and back with fresh noise (what LCM schedulers do). `ode`: Euler steps in angle, exact on
the circle while x0 and z stay: DDIM. `map`: the same steps by a network that is told where each of them ends."""


@dataclass(frozen=True, slots=True)
class FewSteps:
    """The angles at which a student is asked, and how it goes from one to the next."""

    angles: tuple[float, ...]
    how: How = "consistency"

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.angles, (*self.angles[1:], 0.0), strict=True))
        if not self.angles or not falling or self.angles[0] > math.pi / 2 + 1e-9:
            raise UsageError(f"Angles must fall from at most pi / 2 and stay above 0, got {self.angles}.")

    @classmethod
    def even(cls, calls: int, path: NoisePath, how: How = "consistency", *, shift: float = 1.0) -> Self:
        """K angles, evenly in the network's own time: K/K, ..., 1/K of that of `path.start`, at whole times where the network
        has a table of them (its schedulers elsewhere know no others). shift > 1 moves them towards noise, as
        flow-matching schedulers do: t s / (1 + (s - 1) t)."""
        if calls < 1:
            raise UsageError(f"A sampler needs at least one call, got {calls}.")
        end = float(path.time(torch.tensor([path.start], dtype=torch.float64)))
        shares = [k / calls for k in range(calls, 0, -1)]
        times = torch.tensor([end * shift * t / (1 + (shift - 1) * t) for t in shares], dtype=torch.float64)
        return cls(tuple(path.angle(path.nearest(times)).tolist()), how)


Noise = Callable[[int, Tensor], Tensor]
"""(number of the call, x) -> fresh noise like x."""


class OwnWay(ABC):
    """A student that is not evaluated on the whole of its sample at once. role: whose weights it has."""

    role: Role

    @abstractmethod
    def sampled(self, x: Tensor, condition: Condition, steps: FewSteps, noise: Noise | None) -> Tensor:
        """What `sample` is for others."""


def sample(
    role: Role | Guided | Hinted | FlowMap | OwnWay | Quantised, x: Tensor, condition: Condition, steps: FewSteps,
    noise: Noise | None = None,
) -> Tensor:  # fmt: skip
    """x0 [B, ...] from pure noise x. noise: fresh noise between calls; wanted by `consistency` with several calls."""
    if isinstance(role, OwnWay):
        return role.sampled(x, condition, steps, noise)
    if (steps.how == "map") != isinstance(role, FlowMap):
        raise UsageError(f"Sampling by {steps.how!r} does not fit {type(role).__name__}; 'map' and FlowMap belong together.")
    x0, z = x, x
    for number, (angle, after) in enumerate(zip(steps.angles, (*steps.angles[1:], 0.0), strict=True)):
        tau = torch.full((len(x),), angle, dtype=torch.float64, device=x.device)
        if isinstance(role, FlowMap):
            velocity = role.toward(x, tau, torch.full_like(tau, after), condition)
        else:
            velocity = role.velocity(x, tau, condition)
        cos, sin = (spread(part, x) for part in (tau.cos(), tau.sin()))
        x0, z = cos * x - sin * velocity, sin * x + cos * velocity
        if after == 0.0:
            break
        if steps.how == "consistency":
            if noise is None:
                raise UsageError("Sampling by consistency with several calls needs fresh noise: pass noise=.")
            z = noise(number, x)
        x = math.cos(after) * x0 + math.sin(after) * z
    return x0
