"""Where rounding starts from: which layers there are and what they see, steps of weights, ranges of activations by time.

All from a few of the teacher's own trajectories, without data. Steps and ranges are those with the least squared error of what
was seen, among ranges cut off more and more.

Shapes: W [out, in, ...]; s [out]; T bins; low, step [T]; x [n, ...] what a layer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.distill.method import Batch
from hasten.distill.network.roles import Role
from hasten.distill.network.walk import angles, walk
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.quantised import KINDS, per_channel, rounded, whole
from hasten.pipelines.seams.quantised import Moment
from hasten.session import Attachment

SHARES = tuple(1 - 0.03 * k for k in range(25))
"""Parts of the full range that are tried, from all of it."""

SAMPLE = 4096
"""Numbers kept of what a layer reads in a call."""


@dataclass(frozen=True, slots=True)
class Sight:
    """The layers that can be rounded, in the order in which they run, and those whose inputs change with the latents, and with
    the time."""

    order: tuple[str, ...]
    latents: frozenset[str]
    time: frozenset[str]

    @property
    def edges(self) -> frozenset[str]:
        """The first layer that sees the latents, and the last one."""
        return frozenset({next(name for name in self.order if name in self.latents), self.order[-1]})

    @property
    def clocks(self) -> tuple[str, ...]:
        """Layers that see the time and not the latents: its embedding, and what makes modulations of it."""
        return tuple(name for name in self.order if name in self.time - self.latents)


@torch.no_grad()
def look(role: Role, batch: Batch) -> Sight:
    """What the layers of the role's network see. batch: one row or more.

    Raises `RefusedError` for a network with nothing to round, with adapters on it, or whose layers lose the rows of the batch.
    """
    network = role.host.network
    _refuse(network)
    one = torch.tensor([0])
    condition = batch.condition.rows(one)
    low, high = torch.tensor(angles(role.host.path, 2), dtype=torch.float64).flip(0).unbind()
    g = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 1, *batch.shape, generator=g).to(_device(network)).unbind()
    plain = _read(role, lambda: role.answer(x, low[None], condition))
    moved = _read(role, lambda: role.answer(other, low[None], condition))
    later = _read(role, lambda: role.answer(x, high[None], condition))
    twice = _read(role, lambda: role.answer(torch.cat([x, x, x]), low.repeat(3), condition.rows(one.repeat(3))))
    if not plain:
        raise RefusedError(f"{type(network).__name__} has no linear or convolutional layer that runs; there is nothing to round.")
    for name, (rows, _) in plain.items():
        if twice[name][0] != 3 * rows:
            raise RefusedError(
                f"{name} of {type(network).__name__} reads {rows} rows for one of a batch and {twice[name][0]} for three, so that"
                " the time of each is not known. This network cannot be quantised by time."
            )
    changed = [frozenset(n for n in plain if not torch.equal(plain[n][1], seen[n][1])) for seen in (moved, later)]
    return Sight(tuple(plain), *changed)


@torch.no_grad()
def ranges(
    role: Role, batch: Batch, z: Tensor, bins: int, end: float, steps: int, s: float
) -> Callable[[str, int], tuple[Tensor, Tensor]]:
    """(name of a layer, bits) -> (low, step), [T] each, for what it reads on the teacher's trajectories from noise z.

    A bin of time in which there was no step gets what the nearest one has.
    """
    network = role.host.network
    moment, seen = Moment(network, bins, end), dict[str, dict[int, list[Tensor]]]()

    def keep(name: str, x: Tensor) -> None:
        assert moment.now is not None
        now = int(moment.now[0])  # all rows of a trajectory's step have one time
        seen.setdefault(name, {}).setdefault(now, []).append(_sample(x).float().cpu())

    with _watched(network, keep), _told(moment, network):
        walk(role, z, batch, steps, s)
    device = _device(network)

    def of(name: str, bits: int) -> tuple[Tensor, Tensor]:
        known = {now: _range(torch.cat(parts), bits) for now, parts in seen[name].items()}
        filled = [known[min((abs(k - now), k) for k in known)[1]] for now in range(bins)]
        low, step = (torch.tensor(column, dtype=torch.float32, device=device) for column in zip(*filled, strict=True))
        return low, step

    return of


@torch.no_grad()
def steps_of(weight: Tensor, bits: int) -> Tensor:
    """s, float32 [out]: the one with the least squared error of q s for each output channel."""
    weight = weight.float()
    full: Tensor = weight.abs().flatten(1).amax(1).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    best, least = full, torch.full_like(full, torch.inf)
    for share in SHARES:
        s = full * share
        error = (whole(weight, s, bits) * per_channel(s, weight) - weight).square().flatten(1).sum(1)
        best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    return best


def _range(values: Tensor, bits: int) -> tuple[float, float]:
    """(low, step) with the least squared error of `values` [n]."""
    bottom, top, middle = values.min(), values.max(), values.median()
    floor = (1e-4 * values.abs().max()).clamp_min(1e-6)  # of inputs that never change, such as embeddings of a constant
    best, least = (bottom, floor), float("inf")
    for share in SHARES:
        low = middle + share * (bottom - middle)
        step = (share * (top - bottom)).clamp_min(floor) / (2**bits - 1)
        error = float((rounded(values, low, step, bits) - values).square().sum())
        if error < least:
            best, least = (low, step), error
    return float(best[0]), float(best[1])


def _sample(x: Tensor) -> Tensor:
    """Up to SAMPLE numbers, evenly from all of x."""
    flat = x.detach().flatten()
    every = max(1, -(-flat.numel() // SAMPLE))
    return flat[::every]


def _read(role: Role, call: Callable[[], Any]) -> dict[str, tuple[int, Tensor]]:
    """Layer -> (rows that it reads, numbers of it), in the order in which they run in `call`."""
    found: dict[str, tuple[int, Tensor]] = {}

    def keep(name: str, x: Tensor) -> None:
        found.setdefault(name, (x.shape[0], _sample(x).clone()))

    with role.playing(), _watched(role.host.network, keep):
        call()
    return found


@contextmanager
def _watched(network: nn.Module, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `keep(name, x)` for every layer that can be rounded, as it is called."""

    def hook(name: str) -> Any:
        return lambda module, args: keep(name, args[0])

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in network.named_modules() if type(m) in KINDS]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _told(moment: Moment, network: nn.Module) -> Iterator[None]:
    hold = Attachment()
    moment.watch(hold, network)
    try:
        yield
    finally:
        hold.restore()


def _refuse(network: Any) -> None:
    kind = type(network).__name__
    if any(hasattr(module, "base_layer") for module in network.modules()):
        raise UsageError(f"This {kind} has an adapter on it, and plain weights are quantised. Leave student.base_lora out.")
    if getattr(network, "is_gradient_checkpointing", False):
        raise UsageError("Quantised layers are not there when blocks are evaluated again. Leave train.checkpointing out.")


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
