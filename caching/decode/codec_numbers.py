"""Integers and eight-bit floats.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hasten.caching.decode.codec import Codec, PerChannel, PerToken
from hasten.caching.decode.packed import Growing, gathered

GROUP = 32


class Int8(Codec):
    """Eight bits, one scale per token and 32 channels, for keys and values."""

    kind: ClassVar[str] = "int8"

    def pack(self, x: Tensor, keys: bool) -> Growing:
        return PerToken.of(x, 8, GROUP)


class Kivi(Codec):
    """Four bits (KIVI, 2402.02750): keys with a scale per channel over 32 tokens, since their outliers are channels;
    values with a scale per token and 32 channels; the newest `residual` tokens exact.

    Unlike transformers' quantised cache, nothing is rounded twice: a group is packed once, and eviction takes its codes
    along. An odd head dimension is stored in whole bytes. In a batch with padding a group may begin in the padding, so that
    a text's rounding depends on how long the others are.
    """

    kind: ClassVar[str] = "kivi"

    @property
    def group(self) -> int:
        return GROUP

    def pack(self, x: Tensor, keys: bool) -> Growing:
        if x.shape[-1] % 2:
            return PerToken.of(x, 8, GROUP)
        return PerChannel.of(x, 4, GROUP) if keys else PerToken.of(x, 4, GROUP)


class Fp8(Codec):
    """Eight-bit floats (e4m3), one scale per token and head: the largest number of a token becomes 448."""

    kind: ClassVar[str] = "fp8"

    def pack(self, x: Tensor, keys: bool) -> Growing:
        return Scaled.of(x)


@dataclass(frozen=True, slots=True)
class Scaled:
    """x = scale * numbers: float8_e4m3fn [B, Hk, S, D], scale float32 [B, Hk, S, 1]."""

    numbers: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Scaled:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = (x.float().abs().amax(-1, keepdim=True) / largest).clamp_min(1e-30)
        return cls((x.float() / scale).to(torch.float8_e4m3fn), scale, x.dtype)

    def read(self) -> Tensor:
        return (self.numbers.float() * self.scale).to(self.dtype)

    def take(self, index: Tensor) -> Scaled:
        # Indexing eight-bit floats is not implemented everywhere; their bytes can be.
        bytes_ = gathered(self.numbers.view(torch.uint8), index).view(torch.float8_e4m3fn)
        return Scaled(bytes_, gathered(self.scale, index), self.dtype)

    def rows(self, index: Tensor) -> Scaled:
        bytes_ = self.numbers.view(torch.uint8).index_select(0, index).view(torch.float8_e4m3fn)
        return Scaled(bytes_, self.scale.index_select(0, index), self.dtype)

    def joined(self, other: Self) -> Scaled:
        bytes_ = torch.cat([self.numbers.view(torch.uint8), other.numbers.view(torch.uint8)], 2)
        return Scaled(bytes_.view(torch.float8_e4m3fn), torch.cat([self.scale, other.scale], 2), self.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.numbers, self.scale]
