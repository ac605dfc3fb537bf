"""A student's weights as files that plain diffusers loads: its adapter as a LoRA, or a whole network.

Shapes: as in `pipelines/lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hasten.distill.network.roles import Role
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.lora import Lora, LowRank, marks


def lora_of(role: Role, weights: Mapping[str, Tensor] | None = None) -> Lora:
    """The adapter of `role` alone, without a style that is kept below it.

    weights: name of a parameter -> value that stands for it, such as a player's average; the network's own by default.
    Raises `UsageError` for a role without an adapter, or where `weights` are not all of it.
    """
    if role.stage is None or not role.trained:
        raise UsageError(f"Role {role.name!r} has no adapter of its own; its whole network is what was trained. See save_network.")
    values = role.parameters() if weights is None else weights
    return _adapter(role, role.adapters[-1], values)


def styles_of(role: Role) -> list[Lora]:
    """The adapters that `role` keeps below its own (`--base-lora`), at the scales at which they are on."""
    own = role.adapters[:-1] if role.trained else role.adapters
    return [_adapter(role, name, dict(role.host.network.named_parameters())) for name in own]


def _adapter(role: Role, name: str, values: Mapping[str, Tensor]) -> Lora:
    network = role.host.network
    layers = {}
    modules: list[tuple[str, Any]] = list(network.named_modules())
    for place, layer in modules:
        if name not in getattr(layer, "lora_A", ()):
            continue
        down, up = (values.get(f"{place}.{part}.{name}.weight") for part in ("lora_A", "lora_B"))
        if down is None or up is None:
            raise UsageError(f"The weights given for role {role.name!r} lack those of {place!r}. Pass the average of this role.")
        bias = values.get(f"{place}.lora_B.{name}.bias")
        scale = float(layer.scaling[name])
        layers[place] = LowRank(_kept(down), _kept(up), scale * len(down), None if bias is None else _kept(bias) * scale)
    facts = {"network": type(network).__name__, "weights": marks(network, layers)}
    return Lora(role.host.site, layers, facts)


def _kept(value: Tensor) -> Tensor:
    return value.detach().clone()


def save_network(role: Role, folder: Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write a student that is a whole network, as safetensors that its class's `from_pretrained` loads.

    Raises `UsageError` for a student that is an adapter, `RefusedError` for a network that cannot write itself.
    """
    network: Any = role.host.network
    if role.stage is not None:
        raise UsageError(f"Role {role.name!r} is an adapter on its teacher's weights; write it with lora_of(role).save.")
    if not hasattr(network, "save_pretrained"):
        raise RefusedError(f"{type(network).__name__} is no network of diffusers and has no save_pretrained.")
    with _instead(network, weights or {}):
        network.save_pretrained(folder, safe_serialization=True)
    return folder


@contextmanager
def _instead(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the network's parameters have these values."""
    own = {name: parameter for name, parameter in network.named_parameters() if name in weights}
    kept = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = weights[name].to(parameter.data)
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = kept[name]
