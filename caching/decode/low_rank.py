"""ShadowKV's store (2410.21465): keys of low rank, values in a slower memory, and keys unlike their neighbours whole.

Shapes: see `hasten.caching.decode`; r rank, E slots that stay whole, c chunks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.decode.codec import Codec
from hasten.caching.decode.packed import NONE, Far, Growing, gathered
from hasten.caching.decode.turns import Turns
from hasten.caching.store import numbered
from hasten.errors import RefusedError


class LowRank(Codec):
    """A prompt's keys, their rotation undone, as a product of two thin matrices over all key heads together, and its values in
    the CPU's memory (pinned where the model is on a GPU; on a CPU simply another tensor). What is generated stays whole.

    rank: numbers that a token keeps, as a share of the numbers of its keys (the paper: 160 of 1,024). outliers: so many chunks
    of `chunk` tokens of each head, those with a key of the smallest cosine to the chunk's mean, keep their keys whole (the
    paper: 48 of 8). Each piece of a prompt (a turn of a conversation) has a product of its own; one of no
    more tokens than the rank waits for more. residual: the prompt's last tokens, whole (the paper: 4 chunks).

    Differences from the paper: the values of outliers are in the slower memory, too; a sum of squares of the keys is
    decomposed instead of the keys themselves, which gives the same product.
    """

    kind: ClassVar[str] = "low-rank"
    prompts_only: ClassVar[bool] = True
    rank: float = Field(0.15625, gt=0, le=1)
    chunk: int = Field(8, ge=1)
    outliers: int = Field(48, ge=0)

    @property
    def group(self) -> int:
        return self.chunk

    def least(self, channels: int) -> int:
        return 1 + self._rank(channels)

    def _rank(self, channels: int) -> int:
        return max(1, math.ceil(self.rank * channels))

    def pack(self, x: Tensor, keys: bool) -> Growing:
        """Keys that are not turned by any position, all of them there."""
        place = torch.arange(x.shape[2], dtype=torch.int32, device=x.device).expand(x.shape[0], 1, -1)
        return self.form(place, None)(x, keys)

    def form(self, place: Tensor, turns: Turns | None) -> Callable[[Tensor, bool], Growing]:
        return functools.partial(self._packed, place, turns)

    def _packed(self, place: Tensor, turns: Turns | None, x: Tensor, keys: bool) -> Growing:
        if not keys:
            return Far.of(x)
        place = place[..., : x.shape[2]]
        low = Factored.of(x, place, turns, self._rank(x.shape[1] * x.shape[3]))
        chunks = min(self.outliers, x.shape[2] // self.chunk)
        return Spared.of(low, x, odd(x, place, self.chunk, chunks))


def odd(k: Tensor, place: Tensor, chunk: int, count: int) -> Tensor:
    """The slots of the `count` chunks of each head that hold a key of the smallest cosine to the chunk's mean: int64 [B, Hk,
    count * chunk], ascending. k [B, Hk, n, D], n a multiple of `chunk`. Chunks with padding come last."""
    b, hk, n, d = k.shape
    parts = k.float().reshape(b, hk, n // chunk, chunk, d)
    cosine = torch.cosine_similarity(parts, parts.mean(3, keepdim=True), dim=-1).amin(-1)
    holes = (place < 0).view(b, -1, n // chunk, chunk).any(-1)
    least = cosine.masked_fill(holes, math.inf).topk(count, dim=-1, largest=False).indices.sort(-1).values
    return (least[..., None] * chunk + torch.arange(chunk, device=k.device)).flatten(2)


@dataclass(frozen=True, slots=True)
class Factored:
    """Keys before their rotation as left @ basis: left [B, P, S, r], basis: of each piece [B, Hk, r, D]; piece int16 [B, P,
    S]: whose basis a slot takes. place int32 [B, P, S], by which keys are turned again; turns: how (None: they are not)."""

    left: Tensor
    basis: tuple[Tensor, ...]
    piece: Tensor
    place: Tensor
    turns: Turns | None

    @classmethod
    def of(cls, k: Tensor, place: Tensor, turns: Turns | None, rank: int) -> Factored:
        """The best product of this rank for k [B, Hk, n, D] at places int32 [B, P, n]; negative: padding, which is zero."""
        b, hk, n, d = k.shape
        bare = k.float() if turns is None else turns.undone(k.float(), place)
        flat = bare.transpose(1, 2).reshape(b, n, hk * d)
        squares = flat.double().mT @ flat.double()
        if not bool(torch.isfinite(squares).all()):
            raise RefusedError("A codec of low rank got keys that are not finite. Leave the codec out for this model.")
        vectors = torch.linalg.eigh(squares).eigenvectors[..., -rank:].to(flat.dtype)
        left = (flat @ vectors)[:, None].to(k.dtype)
        basis = vectors.mT.reshape(b, -1, hk, d).transpose(1, 2).to(k.dtype).contiguous()
        piece = torch.zeros(b, 1, n, dtype=torch.int16, device=k.device)
        return cls(left, (basis,), piece, place.clone(), turns)

    def read(self) -> Tensor:
        return self._keys(self.left, self.piece, self.place)

    def at(self, index: Tensor) -> Tensor:
        """The keys of these slots alone, int64 [B, 1 or Hk, n]; anything where it is `NONE`: [B, Hk, n, D]."""
        return self._keys(*self._taken(index))

    def _keys(self, left: Tensor, piece: Tensor, place: Tensor) -> Tensor:
        keys = left @ self.basis[0]
        for number, basis in enumerate(self.basis[1:], 1):
            keys = torch.where((piece == number)[..., None], left @ basis, keys)
        return keys if self.turns is None else self.turns.made(keys.float(), place).to(left.dtype)

    def _taken(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        planes = max(index.shape[1], self.left.shape[1])
        index = index.expand(-1, planes, -1)
        piece, place = (x.expand(-1, planes, -1).gather(2, index.clamp(min=0)) for x in (self.piece, self.place))
        return gathered(self.left.expand(-1, planes, -1, -1), index), piece, place.masked_fill(index < 0, NONE)

    def take(self, index: Tensor) -> Factored:
        left, piece, place = self._taken(index)
        return Factored(left, self.basis, piece, place, self.turns)

    def rows(self, index: Tensor) -> Factored:
        left, piece, place = (x.index_select(0, index) for x in (self.left, self.piece, self.place))
        return Factored(left, tuple(basis.index_select(0, index) for basis in self.basis), piece, place, self.turns)

    def joined(self, other: Self) -> Factored:
        planes = max(self.left.shape[1], other.left.shape[1])
        parts = [(self.left, self.piece, self.place), (other.left, other.piece + len(self.basis), other.place)]
        left, piece, place = (torch.cat([x.expand(-1, planes, *x.shape[2:]) for x in pair], 2) for pair in zip(*parts, strict=True))
        return Factored(left, self.basis + other.basis, piece, place, other.turns)

    def tensors(self) -> list[Tensor]:
        return [self.left, *self.basis, self.piece, self.place]


@dataclass(frozen=True, slots=True)
class Spared:
    """Some slots whole, the others as `rest` has them. label: int32 [B, Hk, S], the number of a whole slot in exact [B, Hk, E,
    D], else `NONE`."""

    rest: Factored
    label: Tensor
    exact: Tensor

    @classmethod
    def of(cls, rest: Factored, x: Tensor, whole: Tensor) -> Spared:
        """whole: slots of x [B, Hk, n, D], int64 [B, Hk, E]."""
        label = torch.full(x.shape[:3], NONE, dtype=torch.int32, device=x.device)
        number = torch.arange(whole.shape[2], dtype=torch.int32, device=x.device).expand_as(whole)
        return cls(rest, label.scatter_(2, whole, number), gathered(x, whole))

    def read(self) -> Tensor:
        return self._over(self.rest.read(), self.label)

    def at(self, index: Tensor) -> Tensor:
        """As `Factored.at`."""
        return self._over(self.rest.at(index), self._labels(index))

    def _labels(self, index: Tensor) -> Tensor:
        index = index.expand(-1, self.label.shape[1], -1)
        return self.label.gather(2, index.clamp(min=0)).masked_fill(index < 0, NONE)

    def _over(self, keys: Tensor, label: Tensor) -> Tensor:
        if not self.exact.shape[2]:
            return keys
        return torch.where((label >= 0)[..., None], gathered(self.exact, label.long()), keys)

    def take(self, index: Tensor) -> Spared:
        label, whole = self._labels(index), self.exact.shape[2]
        if not whole:
            return Spared(self.rest.take(index), label, self.exact)
        # Whole keys whose slots leave go, too.
        used = torch.zeros(*label.shape[:2], whole + 1, dtype=torch.bool, device=label.device)
        used = used.scatter_(2, torch.where(label >= 0, label.long(), whole), True)[..., :whole]
        width = int(used.sum(-1).max())
        stay = numbered(used.flatten(0, 1), width, whole - 1).view(*label.shape[:2], width)
        moved = (used.int().cumsum(-1) - 1).gather(2, label.clamp(min=0).long())
        label = torch.where(label >= 0, moved, NONE).int()
        return Spared(self.rest.take(index), label, gathered(self.exact, stay))

    def rows(self, index: Tensor) -> Spared:
        return Spared(self.rest.rows(index), self.label.index_select(0, index), self.exact.index_select(0, index))

    def joined(self, other: Self) -> Spared:
        label = torch.where(other.label >= 0, other.label + self.exact.shape[2], NONE).int()
        exact = torch.cat([self.exact, other.exact], 2)
        return Spared(self.rest.joined(other.rest), torch.cat([self.label, label], 2), exact)

    def tensors(self) -> list[Tensor]:
        return [*self.rest.tensors(), self.label, self.exact]
