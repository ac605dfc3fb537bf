"""A toy that hears the time as diffusers' networks do, so that students can be told things, and trainings of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Loss, Method
from hasten.distill.network.host_call import HostCall
from hasten.distill.network.paths import Flow, NoisePath
from hasten.distill.network.roles import Adapter, Roles
from hasten.pipelines.host import Layout
from tests.distill import toys

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
"""alpha squared at each of 1000 times: a linear table, as of networks that predict noise."""


class TimestepEmbedding(nn.Module):
    """As in diffusers: two layers, found by its class's name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(2, 12), nn.Linear(12, 16)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(features)))


class Timed(nn.Module):
    """hidden_states [B, 5], timestep [B], encoder_hidden_states [B, 5] -> [B, 5], modulated by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2 * toys.WIDTH, 16), nn.Linear(16, toys.WIDTH)
        self.time_embed = TimestepEmbedding()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        turn = timestep[:, None] / 300
        vector = self.time_embed(torch.cat([turn.sin(), turn.cos()], 1))
        return (self.last((self.first(torch.cat([hidden_states, encoder_hidden_states], 1)) + vector).tanh()),)


def host(path: NoisePath | None = None) -> HostCall:
    """The toy with random weights, and how it is called."""
    torch.manual_seed(0)
    network, fixed = Timed(), {"encoder_hidden_states": torch.zeros(1, toys.WIDTH)}
    return HostCall(network, "timed", Layout.of(network), fixed, path or Flow(), (toys.WIDTH,), torch.float32, 1.0, None)


def trainer(method: Method, out: Path, full: bool = False, path: NoisePath | None = None, **settings: Any) -> Trainer:
    """A training of the toy; prompts alone, or points of the teacher's way, where
    the method wants them. The same arguments give the same training."""
    made = host(path)
    roles = Roles.of_copies(made, method.trains) if full else Roles.on_one_base(made, method.trains, Adapter(rank=4))
    data = replace(toys.store(), x0=None, z=None) if method.data == "prompts" else toys.store()
    if method.way_points:
        way = torch.randn(len(data), method.way_points - 1, toys.WIDTH, generator=torch.Generator().manual_seed(2))
        data = replace(data, way=way)
    chosen = TrainSettings(**{"steps": 6, "batch": 8, "lr": 1e-2, "warmup": 2, **settings})
    return Trainer(method, roles, data, chosen, out, (toys.WIDTH,), progress=False)


def losses(made: Trainer, rows: list[int], step: int = 0) -> list[Loss]:
    """The losses of one step's phases, on these rows alone."""
    draw, kept, found = Draw(0, step, rows), dict[str, Any](), []
    batch = made.data.batch(torch.tensor(rows), draw)
    for phase in made.state.phases(step):
        found.append(made.state.loss(phase, batch, draw, step, kept))
        kept |= found[-1].keep
    return found
