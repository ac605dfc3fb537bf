"""Every transformer class of diffusers at a tiny size: what it is built from and what it is called with."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Small:
    """One class at a tiny size.

    name: the class's name. build: makes the model; its weights are drawn afterwards by `made`. inputs(seed, size):
    keyword arguments of `forward` for one branch, without the sample and the timestep: the conditioning (drawn from
    `seed`) and whatever belongs to the resolution. sample(seed, size): the noisy latents; size 0 is the usual
    resolution, size 1 another one that the class accepts. timestep(t): the argument for `Step.time`-like t in (0, 1].
    sample_name, timestep_name: what forward calls them. flow: velocity (flow matching) or noise prediction.
    injections(seed, size): extra keyword arguments that add something between blocks (ControlNet residuals, VACE
    hints, IP-Adapter embeddings), by name of the kind; empty where the class takes none. takes: what forward is
    handed in place of the sample, for classes that take a list of images.
    heterogeneous: why a stack can never be skipped here, if it is known; only documentation.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    sample: Callable[[int, int], Tensor]
    timestep: Callable[[float], Any]
    sample_name: str = "hidden_states"
    timestep_name: str = "timestep"
    flow: bool = True
    takes: Callable[[Tensor], Any] = lambda x: x
    injections: dict[str, Callable[[int, int], Inputs]] = field(default_factory=dict)
    heterogeneous: str = ""

    def made(self, seed: int = 0) -> nn.Module:
        """The model in eval mode with every parameter drawn anew, so that no gate or projection is zero."""
        torch.manual_seed(seed)
        model = self.build().eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 / parameter[0].numel() ** 0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return model

    def call(self, model: nn.Module, x: Tensor, t: float, conditioning: Inputs) -> Any:
        """One evaluation; returns what forward returns with `return_dict=False` where that exists."""
        arguments = {self.sample_name: self.takes(x), self.timestep_name: self.timestep(t), **conditioning}
        return model(**arguments)


SMALL: dict[str, Small] = {}
"""Class name -> its description; filled by importing the modules in `models/`."""

EXCLUDED: dict[str, str] = {}
"""Class name -> why it cannot be built small."""


def register(small: Small) -> Small:
    """Add a description; a second one of the same class is an error."""
    assert small.name not in SMALL, f"{small.name} is described twice"
    SMALL[small.name] = small
    return small


def exclude(name: str, reason: str) -> None:
    """Say why a class is not described."""
    EXCLUDED[name] = reason


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every() -> dict[str, Small]:
    """All descriptions, every module of `models/` imported."""
    from tests.conformance import models

    for module in pkgutil.iter_modules(models.__path__):
        importlib.import_module(f"{models.__name__}.{module.name}")
    return SMALL
