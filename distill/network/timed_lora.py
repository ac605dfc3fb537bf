"""Training an adapter whose strength follows the time (`pipelines/timed_lora.py`), for any method: `student.experts`.

The gates lie in the network beside the adapter, under its name, so that they are trained, averaged, saved and resumed with
it; they are on whenever the adapter is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.distill.network.host_call import HostCall
from hasten.errors import UsageError
from hasten.pipelines.timed_lora import TimedGates
from hasten.session import Attachment

if TYPE_CHECKING:
    from hasten.distill.network.roles import Role

HOLDER = "timed_lora"
"""Name of the module in the network that holds the gates of all roles."""


def give_time(host: HostCall, name: str, experts: int) -> None:
    """Let the adapter `name` on the host's network have `experts` that follow the time. It changes nothing yet.

    Raises `UsageError` for ranks that do not divide among the experts.
    """
    network: Any = host.network
    layers: list[tuple[str, Any]] = [(n, m) for n, m in network.named_modules() if name in getattr(m, "lora_A", ())]
    ranks = {layer.r[name] for _, layer in layers}
    if any(rank % experts for rank in ranks):
        raise UsageError(f"student.rank = {max(ranks)} does not divide among {experts} experts. Take a multiple of {experts}.")
    like = next(network.parameters())
    gates = TimedGates([n for n, _ in layers], experts, float(getattr(host.path, "unit", 1000.0))).to(like.device)
    if HOLDER not in network._modules:
        network.add_module(HOLDER, nn.ModuleDict())
    network.get_submodule(HOLDER)[name] = gates
    gates.put_on(Attachment(), network, name)  # for as long as the network is trained


def gates_of(role: Role, weights: Mapping[str, Tensor] | None = None) -> TimedGates | None:
    """The gates of a role's adapter with the values that stand for them in `weights`; None for an ordinary adapter."""
    holder = role.host.network._modules.get(HOLDER)
    if holder is None or role.stage is None or role.adapters[-1] not in holder:  # type: ignore[operator]
        return None
    name = role.adapters[-1]
    own: Any = holder.get_submodule(name)
    made = TimedGates(own.layers, own.experts, own.unit, len(own.table.values))
    value = (weights or {}).get(f"{HOLDER}.{name}.table.values", own.table.values)
    with torch.no_grad():
        made.table.values.copy_(value)
    return made
