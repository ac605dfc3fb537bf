"""Everything of one trained role that a training changes: its weights, its heads, its optimiser, its average.

Shapes: none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hasten.errors import ResumeError

Weights = dict[str, Tensor]


@dataclass
class Player:
    """One role's share of a training.

    parameters: name -> weight, the network's (or adapter's) own and those of heads, the latter below `heads.`. buffers:
    what heads keep without gradient. optimizer: None for roles that follow as an average. average: an exponential
    average of `parameters`, which is what is exported; {} without one.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    buffers: Weights = field(default_factory=dict)
    average: Weights = field(default_factory=dict)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Let the average follow by one step."""
        if self.average:
            own = list(self.average.values())
            torch._foreach_lerp_(own, [self.parameters[name].detach() for name in self.average], 1 - decay)

    def still(self, first: Mapping[str, Tensor]) -> list[str]:
        """Names of weights that are bit for bit as they were: nothing trained them."""
        return [name for name, value in self.parameters.items() if torch.equal(value.detach().cpu(), first[name].cpu())]

    def save(self, folder: Path) -> None:
        """`weights.safetensors`, `average.safetensors`, `optimizer.safetensors` in a folder that is there."""
        save_file(_own(self.parameters | self.buffers), folder / "weights.safetensors")
        if self.average:
            save_file(_own(self.average), folder / "average.safetensors")
        if self.optimizer is not None:
            save_file(_flat(self.optimizer), folder / "optimizer.safetensors")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restore in place. Raises `ResumeError` naming what is missing or does not fit."""
        self._restore(folder / "weights.safetensors", self.parameters | self.buffers)
        if self.average:
            self._restore(folder / "average.safetensors", self.average)
        if self.optimizer is not None:
            _unflat(self.optimizer, _read(folder / "optimizer.safetensors"), self.name)

    def _restore(self, file: Path, into: Mapping[str, Tensor]) -> None:
        found = _read(file)
        odd = sorted(found.keys() ^ into.keys())
        if odd:
            raise ResumeError(
                f"{file.name} of role {self.name!r} and this training differ in {len(odd)} weights ({', '.join(odd[:3])})."
                " Resume with the configuration it was started with, or start in an empty folder."
            )
        for name, value in found.items():
            into[name].copy_(value)


def _own(tensors: Mapping[str, Tensor]) -> Weights:
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def _read(file: Path) -> Weights:
    if not file.is_file():
        raise ResumeError(f"{file.parent.name}/{file.name} is missing, so that this training cannot go on. Restore it.")
    return load_file(file)


def _flat(optimizer: torch.optim.Optimizer) -> Weights:
    flat: dict[str, Any] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for key, value in slots.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}, not as a tensor.")
            flat[f"{index}.{key}"] = value
    return _own(flat)


def _unflat(optimizer: torch.optim.Optimizer, flat: Weights, role: str) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        index, key = name.split(".", 1)
        slots.setdefault(int(index), {})[key] = value
    known = sum(len(group["params"]) for group in optimizer.param_groups)
    if not set(slots) <= set(range(known)):  # a weight that no loss has reached has none
        raise ResumeError(f"The optimiser of role {role!r} was saved for {len(slots)} weights, this training has {known}.")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
