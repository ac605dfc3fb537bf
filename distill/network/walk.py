"""The teacher's own trajectory: from noise to data in steps of its own, with all that it said on the way.

What a student of the same steps is compared with, without any data (EfficientDM, arXiv 2310.03270, section 3.2).

Shapes: B rows; K steps; x, c, u [B, ...] on the circle and in the network's own terms; tau float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.distill.method import Batch
from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import HALF_TURN, NoisePath, guided, spread, turned
from hasten.distill.network.roles import Role


@dataclass(frozen=True, slots=True)
class Walk:
    """taus: the angles, K numbers. Per step: x, and the network's answers c with prompts and u without; u is () for a teacher
    without guidance."""

    taus: tuple[float, ...]
    x: tuple[Tensor, ...]
    c: tuple[Tensor, ...]
    u: tuple[Tensor, ...]


def angles(path: NoisePath, steps: int) -> tuple[float, ...]:
    """K angles from the end of the path, evenly in the network's own time, as its schedulers have them."""
    end = float(path.time(torch.tensor([getattr(path, "end", HALF_TURN)], dtype=torch.float64)))
    times = torch.arange(steps, 0, -1, dtype=torch.float64) * (end / steps)
    return tuple(path.angle(path.nearest(times)).tolist())


@torch.no_grad()
def walk(role: Role, z: Tensor, batch: Batch, steps: int, s: float) -> Walk:
    """K DDIM steps (Euler in angle) of `role` from noise z, guided by u + s (c - u)."""
    taus = angles(role.host.path, steps)
    empty = batch.empty.rows(torch.zeros(len(z), dtype=torch.int64))
    both = batch.condition if s == 1 else Condition.join([batch.condition, empty])
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    x = z
    for now, after in zip(taus, (*taus[1:], 0.0), strict=True):
        tau = torch.full((len(x),), now, dtype=torch.float64, device=x.device)
        if s == 1:
            c = u = role.answer(x, tau, both)
        else:
            c, u = role.answer(torch.cat([x, x]), torch.cat([tau, tau]), both).chunk(2)
        seen.append((x, c, u))
        p, q = (spread(factor, x) for factor in role.host.path.factors(tau))
        x = turned(x, p * x + q * guided(u, c, s), tau - after)
    xs, cs, us = zip(*seen, strict=True)
    return Walk(taus, xs, cs, () if s == 1 else us)
