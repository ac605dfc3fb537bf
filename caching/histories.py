"""What was computed inside a network: one forecast per branch, site and tensor."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from hasten.agree import Mean, alone
from hasten.forecast import Forecast, ForecastState

Key = tuple[Hashable, ...]
"""What must be the same for a history to be used: shape, dtype and device of an input, and whatever else counts."""


def key_of(x: Tensor) -> Key:
    """Shape, dtype and device of `x`."""
    return (x.shape, x.dtype, x.device)


class Histories:
    """Histories of the sites of one network during one run. Nothing is shared between branches or sites.

    agree: makes the flags of all ranks that share a sample one; the seam sets it.
    """

    agree: Mean = staticmethod(alone)

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self._sites: dict[tuple[int, Hashable], tuple[Key, list[ForecastState]]] = {}
        self._finite: dict[int, Tensor] = {}

    def estimate(self, branch: int, site: Hashable, key: Key, t: float) -> list[Tensor] | None:
        """What stands in for the site's tensors at `t`; None without a history under this very key."""
        held = self._sites.get((branch, site))
        if held is None or held[0] != key or not all(forecast.ready for forecast in held[1]):
            return None
        return [forecast.estimate(t) for forecast in held[1]]

    def store(self, branch: int, site: Hashable, key: Key, t: float, values: list[Tensor]) -> None:
        """The site was computed. Copies are kept, because a host may change what it got in place."""
        held = self._sites.get((branch, site))
        if held is None or held[0] != key or len(held[1]) != len(values):
            held = self._sites[branch, site] = (key, [self.forecast.start() for _ in values])
        for forecast, value in zip(held[1], values, strict=True):
            forecast.store(t, value.clone())

    def check(self, branch: int, outputs: list[Tensor]) -> None:
        """Remember on the device whether the network's outputs are finite; a NaN inside reaches them."""
        self._finite[branch] = torch.stack([torch.isfinite(y).all() for y in outputs]).all()

    def drop_poisoned(self) -> list[int]:
        """Forget the branches whose outputs were not finite and name them. One host synchronisation."""
        if not self._finite:
            return []
        numbers, flags = list(self._finite), self.agree(torch.stack(list(self._finite.values())).float()).tolist()
        self._finite.clear()
        bad = [number for number, healthy in zip(numbers, flags, strict=True) if not healthy >= 1]
        self._sites = {where: held for where, held in self._sites.items() if where[0] not in bad}
        return bad

    def keep(self, sites: set[str]) -> None:
        """Drop the histories of all other sites."""
        self._sites = {where: held for where, held in self._sites.items() if where[1] in sites}

    def num_bytes(self) -> int:
        """Bytes of all tensors held for later steps."""
        held = {t.data_ptr(): t for _, forecasts in self._sites.values() for f in forecasts for t in f.tensors()}
        return sum(t.numel() * t.element_size() for t in held.values())

    def forget(self) -> None:
        """Drop everything held."""
        self._sites.clear()
        self._finite.clear()
