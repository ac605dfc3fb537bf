"""How a model turns keys by their position: cosines and sines by place, as it made them.

Shapes: see `hasten.caching.decode`; R numbers of a key that are turned, the first ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.caching.decode.packed import stored


class Turns:
    """Cosines and sines of the places of one cache, float [L, R] each, where number i and number i + R / 2 of a key are turned
    together (Llama's form of rotary positions). Places that nobody wrote are not turned.

    Undoing a turn and making it again is exact up to rounding whatever the table says: a model that turns otherwise only has
    keys that take a higher rank.
    """

    def __init__(self) -> None:
        self.cos = self.sin = torch.empty(0, 0)

    def write(self, cos: Tensor, sin: Tensor, at: Tensor, end: int) -> None:
        """What a call of the model turns by: cos, sin [B or 1, n, R] of tokens at places int [B, n] before `end` (negative:
        padding)."""
        if end > self.cos.shape[0]:
            room = end + self.cos.shape[0] // 8
            grown = cos.new_ones(room, cos.shape[-1]), sin.new_zeros(room, sin.shape[-1])
            for new, old in zip(grown, (self.cos, self.sin), strict=True):
                if old.numel():
                    new[: old.shape[0]] = old
            self.cos, self.sin = grown
        real = at >= 0
        for table, given in ((self.cos, cos), (self.sin, sin)):
            table[at[real].long()] = given.expand(at.shape[0], -1, -1)[real]

    def of(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of places int [...], each [..., R]; those of place 0 where there is none."""
        near = at.clamp(min=0).long()
        return self.cos[near], self.sin[near]

    def made(self, x: Tensor, place: Tensor) -> Tensor:
        """Keys x [B, H, n, D] turned by their places int [B, 1 or H, n]."""
        cos, sin = self._like(x, place)
        return _turned(x, cos, sin)

    def undone(self, x: Tensor, place: Tensor) -> Tensor:
        """The inverse of `made`."""
        cos, sin = self._like(x, place)
        length = (cos.square() + sin.square()).clamp_min(1e-12)  # some models scale while they turn
        return _turned(x, cos / length, -sin / length)

    def _like(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.of(place)
        return cos.to(x.dtype), sin.to(x.dtype)

    @property
    def bytes(self) -> int:
        """Bytes of the tables."""
        return stored([self.cos, self.sin])


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D], of which the first R numbers are turned by cos, sin [..., R]."""
    width = cos.shape[-1]
    part = x[..., :width]
    low, high = part.chunk(2, -1)
    done = part * cos + torch.cat([-high, low], -1) * sin
    return done if width == x.shape[-1] else torch.cat([done, x[..., width:]], -1)
