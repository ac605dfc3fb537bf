"""Slots that are not written any more: what a store keeps behind its dense part.

Shapes: see `hasten.caching.decode`; T slots of all rows and heads together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

NONE = -1
"""The place of a slot that holds nothing, and the number of a slot that is nobody's."""


class Packed(Protocol):
    """Keys or values of S slots, in some form."""

    def read(self) -> Tensor:
        """[B, Hk, S, D] in the dtype they came in; zeros where a slot holds nothing, or what was there."""

    def take(self, index: Tensor) -> Packed:
        """These slots alone: index int64 [B, 1 or Hk, n], `NONE` for none. Exact: nothing is written anew."""

    def rows(self, index: Tensor) -> Packed:
        """These rows, int64 [m], a row perhaps several times."""

    def tensors(self) -> list[Tensor]:
        """All that is held."""


class Growing(Packed, Protocol):
    """Of which more may be packed later."""

    def joined(self, other: Self) -> Self:
        """These slots, and those of `other` behind them."""


@runtime_checkable
class Some(Packed, Protocol):
    """Of which some slots may be read without the others."""

    def at(self, index: Tensor) -> Tensor:
        """What these slots hold, int64 [B, 1 or Hk, n]: [B, Hk, n, D]; anything where the index is `NONE`."""


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """x [B, Hk, S, D] at slots index int64 [B, 1 or Hk, n]: [B, Hk, n, D]; any slot where the index is `NONE`."""
    b, heads, _, d = x.shape
    return x.gather(2, index.clamp(min=0).expand(b, heads, -1)[..., None].expand(-1, -1, -1, d))


def stored(tensors: list[Tensor]) -> int:
    """Bytes of the memory under these tensors, each counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(found.values())


@dataclass(frozen=True, slots=True)
class Flat:
    """Heads that hold different numbers of slots, one after another: data [T, D]. counts: of each row and head, a host
    list [B][Hk]. Slot j of a head is the j-th of its own."""

    data: Tensor
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, x: Tensor, index: Tensor, counts: list[list[int]]) -> Flat:
        """The slots index int64 [B, Hk, n] (its first counts[b][h] count) of x [B, Hk, S, D]."""
        chosen = gathered(x, index)
        wide = torch.arange(chosen.shape[2], device=x.device) < torch.tensor(counts, device=x.device)[..., None]
        return cls(chosen[wide], tuple(map(tuple, counts)))

    @property
    def width(self) -> int:
        """Slots of the head that holds most."""
        return max((max(row) for row in self.counts), default=0)

    def _held(self) -> Tensor:
        """Which slots of [B, Hk, width] there are."""
        count = torch.tensor(self.counts, device=self.data.device)
        return torch.arange(self.width, device=self.data.device) < count[..., None]

    def read(self) -> Tensor:
        held = self._held()
        wide = self.data.new_zeros(*held.shape, self.data.shape[-1])
        wide[held] = self.data
        return wide

    def take(self, index: Tensor) -> Flat:
        wide = self.read()
        index = index.expand(*wide.shape[:2], -1)
        counts = (index >= 0).sum(-1).tolist()
        return Flat.of(wide, index, counts)

    def rows(self, index: Tensor) -> Flat:
        wide, order = self.read(), index.tolist()
        counts = [list(self.counts[row]) for row in order]
        places = torch.arange(wide.shape[2], device=wide.device).expand(len(order), wide.shape[1], -1)
        return Flat.of(wide.index_select(0, index), places, counts)

    def tensors(self) -> list[Tensor]:
        return [self.data]


@dataclass(frozen=True, slots=True)
class Far:
    """Values [B, Hk, S, Dv] in the CPU's memory, exactly as they are; pinned where `device`, on which they are read, is a GPU."""

    data: Tensor
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Far:
        return cls(_there(x.to("cpu", copy=True).contiguous(), x.device), x.device)

    def read(self) -> Tensor:
        return self.data.to(self.device)

    def at(self, index: Tensor) -> Tensor:
        """The values of these slots alone, int64 [B, 1 or Hk, n]: whole rows are copied, and only these cross over."""
        b, heads, slots, d = self.data.shape
        index = index.clamp(min=0).expand(b, heads, -1).to("cpu")
        rows = index + torch.arange(b * heads).view(b, heads, 1) * slots
        found = self.data.view(-1, d).index_select(0, rows.reshape(-1))
        return found.view(b, heads, -1, d).to(self.device)

    def take(self, index: Tensor) -> Far:
        return Far(_there(gathered(self.data, index.to("cpu")), self.device), self.device)

    def rows(self, index: Tensor) -> Far:
        return Far(_there(self.data.index_select(0, index.to("cpu")), self.device), self.device)

    def joined(self, other: Self) -> Far:
        return Far(_there(torch.cat([self.data, other.data], 2), self.device), self.device)

    def tensors(self) -> list[Tensor]:
        return [self.data]


def _there(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory() if device.type == "cuda" else x
