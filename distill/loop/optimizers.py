"""Optimisers by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from hasten.distill.loop.settings import TrainSettings
from hasten.errors import UsageError


def check_optimizer(settings: TrainSettings) -> None:
    """Raises `UsageError` for an optimiser whose package is not there, or that cannot be cut among processes."""
    if settings.optimizer != "adamw8bit":
        return
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            "train.optimizer = adamw8bit needs the package bitsandbytes, which is not installed. pip install bitsandbytes, or"
            " take adamw: an adapter's optimiser is small anyway."
        )
    if settings.shard:
        raise UsageError("train.optimizer = adamw8bit keeps blocks of numbers, which train.shard cannot cut. Take adamw.")


def optimizer_of(settings: TrainSettings, weights: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """The optimiser of these weights. Raises as `check_optimizer`."""
    check_optimizer(settings)
    given = {"lr": rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw8bit":
        made: torch.optim.Optimizer = import_module("bitsandbytes.optim").AdamW8bit(list(weights), **given)
        return made
    return torch.optim.AdamW(list(weights), foreach=True, **given)  # type: ignore[arg-type]


class Together(torch.optim.Optimizer):
    """Several optimisers as one, each for weights of its own: Muon for matrices, AdamW for the rest."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([weight for part in parts for group in part.param_groups for weight in group["params"]], {})
        self.parts = tuple(parts)
        self.param_groups = [group for part in parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """Let the parts work on this one's groups and states."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(dict(state_dict))
        self._share()
