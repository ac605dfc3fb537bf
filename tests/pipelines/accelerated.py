"""Pipelines with their calls, and two recipes, for tests of `hasten.accelerate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.forecast import Polynomial
from hasten.pipelines.session import Session
from hasten.recipe import Recipe
from tests import hosts

HOSTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan": (hosts.small_wan, hosts.WAN_CALL),
    "pixart": (hosts.small_pixart, hosts.PIXART_CALL),
    "flux": (hosts.small_flux, hosts.FLUX_CALL),
    "unet": (hosts.small_unet, hosts.UNET_CALL),
}
ALTERNATE = Recipe(name="alternate", reuse=NetworkReuse(rule=Every(interval=2), forecast=Polynomial(order=1)))
BLOCKS = Recipe(name="blocks", reuse=StackReuse(lead=1, rule=Every(interval=2)))


class Host:
    """One pipeline with its call."""

    def __init__(self, name: str) -> None:
        build, self.call = HOSTS[name]
        self.name, self.pipe = name, build()

    def __call__(self, prompt: str = "a seven", seed: int = 0, **changes: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        arguments = {**self.call, "output_type": "latent", "return_dict": False, **changes}
        return self.pipe(prompt, generator=generator, **arguments)[0]

    @property
    def model(self) -> torch.nn.Module:
        return getattr(self.pipe, "transformer", None) or self.pipe.unet

    def fingerprint(self) -> dict[str, list[str]]:
        """Instance attributes of everything that may have been touched. The scheduler keeps its own counters."""
        found = {"pipe": sorted(vars(self.pipe)), "scheduler": sorted(vars(self.pipe.scheduler))}
        for name, module in self.model.named_modules():
            found[f"model {name}"] = [*sorted(vars(module)), *sorted(map(str, module._forward_hooks))]
        return found


def computed(run: Session, number: int = -1) -> set[int]:
    index = run.trace.runs[number].index
    return {event.step for event in run.trace.of_run(index) if event.action == "compute"}
