"""Codecs: keys and values in fewer bits, behind a store. The family, and the layouts that number formats share.

Shapes: see `hasten.caching.decode`; g tokens or channels that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.decode.packed import Growing, gathered
from hasten.caching.decode.turns import Turns
from hasten.caching.store import numbered
from hasten.errors import RefusedError
from hasten.part import Part


class Codec(Part):
    """Family of the codecs. Slots are packed once, in whole groups of `group` tokens, and never written again: what is
    evicted leaves without a second rounding. residual: the newest tokens, which stay as they are. prompts_only: does what is
    generated stay as it is?
    """

    prompts_only: ClassVar[bool] = False
    residual: int = Field(32, ge=0)

    @property
    def group(self) -> int:
        """Tokens that are packed together."""
        return 1

    def start(self) -> Codec:
        """Codecs remember nothing: this one itself."""
        return self

    def least(self, channels: int) -> int:
        """Fewer tokens than these are not packed yet; channels: numbers of a token's keys, all heads together."""
        return 1

    def pack(self, x: Tensor, keys: bool) -> Growing:
        """x [B, Hk, n, D], n a multiple of `group`; keys: are these keys, or values?"""
        raise NotImplementedError(f"{type(self).__name__} has no pack().")

    def form(self, place: Tensor, turns: Turns | None) -> Callable[[Tensor, bool], Growing]:
        """`pack` for slots of which the first are at places int32 [B, P, n or more], in a model that turns keys so."""
        return self.pack


@dataclass(frozen=True, slots=True)
class PerToken:
    """Codes with scales along each token's channels.

    codes uint8 [B, Hk, S, D'] (one number per channel, or two in a byte), scale and low: float16 [B, Hk, S, G], of each
    group of channels; x = low + scale * code.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, bits: int, group: int) -> PerToken:
        shape, channels = x.shape, x.shape[-1]
        group = channels if channels % group else min(group, channels)
        codes, scale, low = rounded(x.reshape(*shape[:-1], -1, group).float(), bits, -1)
        return cls(nibbles(codes.reshape(shape), bits), scale[..., 0], low[..., 0], bits, x.dtype)

    def read(self) -> Tensor:
        codes = whole_bytes(self.codes, self.bits).to(self.dtype)
        parts = codes.reshape(*codes.shape[:-1], self.scale.shape[-1], -1)
        exact = parts * self.scale.to(self.dtype)[..., None] + self.low.to(self.dtype)[..., None]
        return exact.reshape(codes.shape)

    def take(self, index: Tensor) -> PerToken:
        return self._each(lambda x: gathered(x, index))

    def rows(self, index: Tensor) -> PerToken:
        return self._each(lambda x: x.index_select(0, index))

    def joined(self, other: Self) -> PerToken:
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        codes, scale, low = (torch.cat(pair, 2) for pair in pairs)
        return PerToken(codes, scale, low, self.bits, self.dtype)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PerToken:
        codes, scale, low = map(change, self.tensors())
        return PerToken(codes, scale, low, self.bits, self.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale, self.low]


@dataclass(frozen=True, slots=True)
class PerChannel:
    """Codes with scales along each channel, over groups of consecutive tokens (KIVI's keys, whose outliers are channels).

    codes uint8 [B, Hk, S, D'], scale and low: float16 [B, Hk, C, D] of each group. group: tokens in one, as long as none
    was evicted; then label says of each token which group it was packed in, int32 [B, Hk or 1, S].
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    dtype: torch.dtype
    group: int
    label: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, bits: int, group: int) -> PerChannel:
        b, heads, _, channels = x.shape
        codes, scale, low = rounded(x.reshape(b, heads, -1, group, channels).float(), bits, 3)
        return cls(nibbles(codes.reshape(x.shape), bits), scale[:, :, :, 0], low[:, :, :, 0], bits, x.dtype, group)

    def _labels(self) -> Tensor:
        if self.label is not None:
            return self.label
        slots = torch.arange(self.codes.shape[2], device=self.codes.device, dtype=torch.int32)
        return (slots // self.group).expand(self.codes.shape[0], 1, -1)

    def read(self) -> Tensor:
        codes = whole_bytes(self.codes, self.bits).to(self.dtype)
        if self.label is None:
            scale, low = (x.to(self.dtype).repeat_interleave(self.group, 2) for x in (self.scale, self.low))
        else:
            scale, low = (gathered(x.to(self.dtype), self.label.long()) for x in (self.scale, self.low))
        return codes * scale + low

    def take(self, index: Tensor) -> PerChannel:
        labels, near = self._labels(), index.clamp(min=0)
        planes, groups = max(labels.shape[1], index.shape[1]), self.scale.shape[2]
        label = labels.expand(-1, planes, -1).gather(2, near.expand(-1, planes, -1)).long()
        # Groups that nobody is left of go; slots that hold nothing may say any group.
        used = torch.zeros(*label.shape[:2], groups + 1, dtype=torch.bool, device=label.device)
        used.scatter_(2, torch.where(index >= 0, label, groups).expand_as(label), True)
        used = used[..., :groups]
        width = max(1, int(used.sum(-1).max()))
        stay = numbered(used.flatten(0, 1), width, groups - 1).view(*label.shape[:2], width)
        label = (used.long().cumsum(-1) - 1).clamp(min=0).gather(2, label).int()
        scale, low = gathered(self.scale, stay), gathered(self.low, stay)
        return PerChannel(gathered(self.codes, index), scale, low, self.bits, self.dtype, self.group, label)

    def rows(self, index: Tensor) -> PerChannel:
        codes, scale, low = (x.index_select(0, index) for x in (self.codes, self.scale, self.low))
        label = None if self.label is None else self.label.index_select(0, index)
        return PerChannel(codes, scale, low, self.bits, self.dtype, self.group, label)

    def joined(self, other: Self) -> PerChannel:
        codes, scale, low = (torch.cat([getattr(x, n) for x in (self, other)], 2) for n in ("codes", "scale", "low"))
        label = None
        if self.label is not None or other.label is not None:
            one, two = self._labels(), other._labels() + self.scale.shape[2]
            planes = max(one.shape[1], two.shape[1])
            label = torch.cat([one.expand(-1, planes, -1), two.expand(-1, planes, -1)], 2)
        return PerChannel(codes, scale, low, self.bits, self.dtype, self.group, label)

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale, self.low, *([] if self.label is None else [self.label])]


def rounded(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8, scale, low float16) of float32 x, with one scale along dimension `dim` (kept, of size 1).

    Codes are made for the scale as it is stored. Raises `RefusedError` where that is not finite: there is a NaN, or a number
    beyond float16. Waits for the device.
    """
    low = x.amin(dim, keepdim=True).half()
    scale = ((x.amax(dim, keepdim=True) - low.float()) / (2**bits - 1)).half().clamp_min(6e-8)
    if not bool(torch.isfinite(scale).all()):
        raise RefusedError(
            "A codec got keys or values that are not finite, or beyond 65,504, which its float16 scales cannot hold. Leave the"
            " codec out for this model."
        )
    codes = ((x - low.float()) / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, scale, low


def nibbles(codes: Tensor, bits: int) -> Tensor:
    """Codes of at most 4 bits, two in a byte (the last dimension must be even); others as they are."""
    return codes if bits > 4 else codes[..., ::2] | (codes[..., 1::2] << 4)


def whole_bytes(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `nibbles`."""
    return codes if bits > 4 else torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
