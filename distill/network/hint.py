"""A further number that an unmodified network is told: a guidance scale, or how far a step goes.

Every diffusion network embeds its time into a vector of its own width and modulates its layers by it. While a hint is on,
an embedding of the number is added to that vector. Its last layer starts at zero, so that a hint changes nothing at
first; it is trained beside the adapter (`MethodState.heads`). The network's class, weights and state dict stay as they
are: a forward hook on the one instance, for the time of one call.

Shapes: B rows; number float64 [B], or one float for all rows; the vector [B, width].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from hasten.distill.network.host_call import Condition
from hasten.distill.network.roles import Role
from hasten.errors import ModelError

FEATURES = 32
"""Frequencies of a number's features."""

LOW, HIGH = 0.1, 10.0
"""Radians per unit. Higher ones would make the change of the network with the number rougher than its answer; in
continuous-time methods that is what breaks training (arXiv 2410.11081, section 4.1)."""


class NumberEmbedding(nn.Module):
    """number [B] -> [B, width]: sines and cosines, a layer, and a layer that starts at zero (only the last one: two
    zero layers in a row would never learn). The same weights whatever was drawn before."""

    rates: Tensor

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        rates = torch.logspace(math.log10(LOW), math.log10(HIGH), FEATURES, dtype=torch.float64)
        self.register_buffer("rates", rates, persistent=False)
        # Made on no device, so that no random number of the process is drawn.
        self.first = nn.Linear(2 * FEATURES, width, dtype=dtype, device="meta").to_empty(device="cpu")
        self.last = nn.Linear(width, width, dtype=dtype, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            nn.init.normal_(self.first.weight, std=(2 * FEATURES) ** -0.5, generator=torch.Generator().manual_seed(0))
            nn.init.zeros_(self.first.bias)
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, number: Tensor) -> Tensor:
        angles = number.double()[:, None] * self.rates
        features = torch.cat([angles.sin(), angles.cos()], 1).to(self.first.weight.dtype)
        embedded: Tensor = self.last(nn.functional.silu(self.first(features)))
        return embedded


class Hint:
    """A number's embedding, and the place in a network (and in copies of it) where it is heard.

    Raises `ModelError` for a network in which no module embeds the time as diffusers' networks do.
    """

    def __init__(self, network: nn.Module) -> None:
        self._name, site = _time_embedding(network)
        like = next(network.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        width = int(site.linear_2.out_features)  # type: ignore[union-attr, arg-type]
        self.module = NumberEmbedding(width, dtype).to(like.device)

    @contextmanager
    def on(self, network: nn.Module, number: Tensor | float) -> Iterator[None]:
        """While open, `network` is told `number`."""

        def told(_: nn.Module, __: object, vector: Tensor) -> Tensor:
            rows = torch.as_tensor(number, dtype=torch.float64, device=vector.device).expand(len(vector))
            embedded: Tensor = self.module(rows)
            return vector + embedded.to(vector.dtype)

        handle = network.get_submodule(self._name).register_forward_hook(told)
        try:
            yield
        finally:
            handle.remove()


class Hinted:
    """A role that is told a number in every call."""

    def __init__(self, role: Role, hint: Hint, number: Tensor | float) -> None:
        self.role, self.hint, self.number = role, hint, number

    def velocity(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """F as `Role.velocity`."""
        with self.hint.on(self.role.host.network, self.number):
            return self.role.velocity(x, tau, condition)

    def playing(self) -> AbstractContextManager[None]:
        """As `Role.playing`."""
        return self.role.playing()


class FlowMap:
    """A role that is told how far it goes: `turned(x, U, tau - rho)` is where the trajectory through (x, tau) is at rho."""

    def __init__(self, role: Role, hint: Hint) -> None:
        self.role, self.hint = role, hint

    def toward(self, x: Tensor, tau: Tensor, rho: Tensor, condition: Condition) -> Tensor:
        """U [B, ...], the velocity which, kept on the circle, leads from tau to rho; at rho = tau it is F. Angles
        float64 [B]."""
        with self.hint.on(self.role.host.network, tau - rho):
            return self.role.velocity(x, tau, condition)


def _time_embedding(network: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of what turns features of the time into a vector."""
    module: nn.Module
    for name, module in network.named_modules():
        other = any(word in name for word in ("guidance", "resolution", "aspect", "add_"))
        if type(module).__name__ == "TimestepEmbedding" and not other:
            return name, module
    raise ModelError(
        f"{type(network).__name__} has no TimestepEmbedding, so that it cannot be told a further number. Train without:"
        " told = false and one guidance scale, and another method than meanflow."
    )
