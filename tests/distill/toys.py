"""A network small enough for exact tests of training: two layers, called as a denoiser is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.distill.data.store import Store
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Method
from hasten.distill.network.host_call import Condition, HostCall
from hasten.distill.network.paths import Flow, NoisePath
from hasten.distill.network.roles import Adapter, Roles
from hasten.pipelines.host import Layout

WIDTH, PROMPTS = 5, 3


class Toy(nn.Module):
    """hidden_states [B, 5], timestep [B], encoder_hidden_states [B, 5] -> [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2 * WIDTH + 1, 16), nn.Linear(16, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        told = torch.cat([hidden_states, (timestep / 1000)[:, None], encoder_hidden_states], 1)
        return (self.last(self.first(told).tanh()),)


def host(path: NoisePath | None = None, seed: int = 0) -> HostCall:
    """A toy with random weights and how it is called."""
    torch.manual_seed(seed)
    network = Toy()
    path = path or Flow()
    return HostCall(network, "toy", Layout.of(network), {}, path, (WIDTH,), torch.float32, 1.0, None)


def store(count: int = 24, seed: int = 1) -> Store:
    """Random rows of three prompts."""
    g = torch.Generator().manual_seed(seed)
    conditions = Condition({"encoder_hidden_states": torch.randn(PROMPTS, WIDTH, generator=g)})
    empty = Condition({"encoder_hidden_states": torch.zeros(1, WIDTH)})
    x0, z = torch.randn(2, count, WIDTH, generator=g)
    return Store(("a", "b", "c"), conditions, empty, torch.arange(count) % PROMPTS, x0, z, (WIDTH,))


def roles(method: Method, full: bool = False, path: NoisePath | None = None) -> Roles:
    """The roles of a method on a toy: on one base, or as copies."""
    made = host(path)
    return Roles.of_copies(made, method.trains) if full else Roles.on_one_base(made, method.trains, Adapter(rank=4))


def trainer(method: Method, out: Path, *, full: bool = False, path: NoisePath | None = None, **settings: Any) -> Trainer:
    """A training of a toy; the same arguments give the same training."""
    torch.manual_seed(0)
    chosen = TrainSettings(**{"steps": 6, "batch": 8, "lr": 1e-2, "warmup": 2, **settings})
    return Trainer(method, roles(method, full, path), store(), chosen, out, (WIDTH,), progress=False)
