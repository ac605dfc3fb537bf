"""A role that runs part of its width while it is trained: what its routers shut is multiplied by zero.

The same numbers as slicing and gathering give (`pipelines/seams/routed.py`), with gradients for the routers and a time of
its own for each row. The network's class and modules stay as they are: hooks on the one instance, for one call.

Shapes: B rows; x [B, ...] on the circle; tau float64 [B] radians; hidden states [B, N, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hasten.caching.routers import Gates, RoutedModule, Routers
from hasten.distill.network.host_call import Condition
from hasten.distill.network.roles import Role
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.seams.width_gate import WidthGates, WidthSite


def routers_of(role: Role, x: Tensor, tau: Tensor, condition: Condition, groups: int, tokens: bool) -> tuple[Routers, list[WidthSite]]:
    """Routers for every module of the role's network that can be run in part, and those modules. One evaluation on x
    shows what each costs and proves that it can.

    groups: gates of a feed-forward module; an attention module has one for each head. Raises `RefusedError` where there
    is no such module, and `UsageError` under gradient checkpointing, whose second evaluation would run in full.
    """
    network: Any = role.host.network
    if getattr(network, "is_gradient_checkpointing", False):
        raise UsageError("dydit switches modules off for one evaluation, and checkpointing evaluates twice. Leave it out.")
    gates = WidthGates(network)
    try:
        with torch.no_grad(), role.playing():
            seen = gates.learn(lambda: role.answer(x, tau, condition), "norm", tokens=tokens)
    finally:
        gates.detach()
    if not seen:
        raise RefusedError(f"{type(network).__name__} gives numbers that are not finite for a row of the data.")
    if not gates.sites:
        reasons = ", ".join(sorted(set(gates.refused.values()))) or "it has none"
        raise RefusedError(f"No attention or feed-forward module of {type(network).__name__} can be run in part: {reasons}.")
    found = [
        RoutedModule(
            site.name, site.cut.num if site.cut.heads else min(groups, site.cut.num), site.cut.num, site.flops / gates.flops, site.width
        )
        for site in gates.sites
    ]
    made = Routers(found, {site.name: site.order for site in gates.sites})
    return made.to(x.device), gates.sites


class Routed:
    """A role whose network runs what is open."""

    def __init__(self, role: Role, routers: Routers, sites: list[WidthSite]) -> None:
        self.role, self.routers = role, routers
        self._sites = {site.name: site for site in sites}
        self._gate_of = {one.name: _gate_of(one, routers.orders[one.name]) for one in routers.routed}

    def answer(self, x: Tensor, tau: Tensor, condition: Condition, gates: Gates) -> Tensor:
        """As `Role.answer`."""
        with self.on(gates):
            return self.role.answer(x, tau, condition)

    @contextmanager
    def on(self, gates: Gates) -> Iterator[None]:
        """While open, the role's network runs what `gates` open, row by row."""
        with ExitStack() as stack:
            for name, site in self._sites.items():
                module = self.role.host.network.get_submodule(name)
                keep = gates.units[name][:, self._gate_of[name].to(gates.units[name].device)].repeat_interleave(site.cut.size, 1)
                for out in site.cut.outs:
                    stack.callback(module.get_submodule(out).register_forward_pre_hook(_masking(keep)).remove)
                if name in gates.tokens:
                    stack.callback(module.register_forward_hook(self._passing(name, gates.tokens[name]), with_kwargs=True).remove)
            yield

    def _passing(self, name: str, share: Tensor) -> Any:
        """A hook that lets the tokens pass by that do not run."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Tensor) -> Tensor:
            x = next(iter((*args, *kwargs.values())))
            return made * self.routers.token_gates(name, x, share)[:, :, None].to(made.dtype)

        return hook


def _gate_of(one: RoutedModule, order: Tensor) -> Tensor:
    """Number of the gate that each unit, as stored, belongs to; int64 [units]."""
    found = torch.empty(one.units, dtype=torch.int64)
    for gate in range(one.gates):
        found[order[slice(*one.bounds(gate))]] = gate
    return found


def _masking(keep: Tensor) -> Any:
    """A hook that multiplies what an output projection is given by keep [B, width]."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mask = keep.to(args[0].dtype).reshape(len(keep), *[1] * (args[0].ndim - 2), -1)
        return (args[0] * mask, *args[1:])

    return hook
