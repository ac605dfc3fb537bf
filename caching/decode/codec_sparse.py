"""Mustafar (2505.22913): small numbers of each key and value are dropped, and the rest stands behind a bitmap.

Shapes: see `hasten.caching.decode`; c numbers kept of each token's D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.decode.codec import Codec
from hasten.caching.decode.packed import Growing, gathered


class Bitmap(Codec):
    """Of each token's key and value the largest numbers by magnitude stay, exactly as they are; the others become zero.

    keys, values: shares that are dropped (0.5 in the paper's main setting; 0.7 its strongest). One bit per channel says
    where the kept ones stand. Every token of a head keeps equally many, so that a token is found without a table.
    """

    kind: ClassVar[str] = "bitmap"
    keys: float = Field(0.5, ge=0, lt=1)
    values: float = Field(0.5, ge=0, lt=1)

    def pack(self, x: Tensor, keys: bool) -> Growing:
        return Pruned.of(x, self.keys if keys else self.values)


@dataclass(frozen=True, slots=True)
class Pruned:
    """bits uint8 [B, Hk, S, ceil(D / 8)]: bit j of byte i is channel 8 i + j. numbers [B, Hk, S, c], in channel order."""

    bits: Tensor
    numbers: Tensor
    channels: int

    @classmethod
    def of(cls, x: Tensor, share: float) -> Pruned:
        channels = x.shape[-1]
        count = max(1, channels - int(share * channels))
        kept = x.abs().topk(count, dim=-1).indices.sort(dim=-1).values
        present = torch.zeros(x.shape, dtype=torch.uint8, device=x.device).scatter_(-1, kept, 1)
        present = torch.nn.functional.pad(present, (0, -channels % 8)).view(*x.shape[:-1], -1, 8)
        bits = (present << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)
        return cls(bits, x.gather(-1, kept), channels)

    def read(self) -> Tensor:
        places = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        present = ((self.bits[..., None] >> places) & 1).flatten(-2)[..., : self.channels].bool()
        dense = self.numbers.new_zeros(present.shape)
        dense[present] = self.numbers.flatten()
        return dense

    def take(self, index: Tensor) -> Pruned:
        return Pruned(gathered(self.bits, index), gathered(self.numbers, index), self.channels)

    def rows(self, index: Tensor) -> Pruned:
        return Pruned(self.bits.index_select(0, index), self.numbers.index_select(0, index), self.channels)

    def joined(self, other: Self) -> Pruned:
        bits, numbers = (torch.cat(pair, 2) for pair in zip(self.tensors(), other.tensors(), strict=True))
        return Pruned(bits, numbers, self.channels)

    def tensors(self) -> list[Tensor]:
        return [self.bits, self.numbers]
