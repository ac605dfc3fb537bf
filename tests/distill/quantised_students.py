"""Small pipelines with a student in few bits, for tests of its training and of its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.distill.data.store import Store
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.methods.qalora import Rounding, RoundingState
from hasten.distill.network.host_call import learn
from hasten.distill.network.roles import Adapter, Roles
from tests.hosts import FLUX_CALL, PIXART_CALL, WAN_CALL, small_flux, small_pixart, small_wan

HOSTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "wan": (small_wan, WAN_CALL), "flux": (small_flux, FLUX_CALL), "pixart": (small_pixart, PIXART_CALL),
}  # fmt: skip
PROMPTS = ("a seven", "a three moving left")
SHORT: dict[str, Any] = {"steps": 4, "points": 2, "bins": 3, "samples": 2}


def training(which: str, method: Rounding, out: Path, **settings: Any) -> tuple[Trainer, Any]:
    """A training on a small pipeline, and that pipeline."""
    make, call = HOSTS[which]
    pipe = make(layers=1)
    host, conditions = learn(pipe, [*PROMPTS, ""], **call)
    kept, empty = conditions.rows(torch.arange(2)), conditions.rows(torch.tensor([2]))
    rows = Store(PROMPTS, kept, empty, torch.arange(4) % 2, None, None, host.shape)
    chosen = TrainSettings(**{"steps": 3, "batch": 2, "lr": 1e-2, "warmup": 1, **settings})
    roles = Roles.on_one_base(host, method.trains, Adapter())
    return Trainer(method, roles, rows, chosen, out, host.shape, progress=False), pipe


def state_of(trainer: Trainer) -> RoundingState:
    assert isinstance(trainer.state, RoundingState)
    return trainer.state


def latents(pipe: Any, which: str, **more: Any) -> Tensor:
    call = HOSTS[which][1] | {"output_type": "latent", "guidance_scale": 3.0} | more
    return torch.as_tensor(pipe(PROMPTS[0], generator=torch.Generator().manual_seed(1), **call)[0])
