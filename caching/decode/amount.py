"""How many slots are kept: of a row, of its layers, of its heads.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.part import Part


class Amount(Part):
    """Family of the amounts. `needs_worth`: does it look at what slots are worth?"""

    needs_worth: ClassVar[bool] = False

    def start(self) -> Amount:
        """Amounts remember nothing: this one itself."""
        return self

    def of(self, length: int, worth: Tensor | None) -> int:
        """Slots to keep of a row of `length` tokens so far. worth: float32 [n], what those that are held are worth, added
        over heads; for those that need it. At least 1."""
        raise NotImplementedError(f"{type(self).__name__} has no of().")


class Tokens(Amount):
    """A number of tokens, however long the text is."""

    kind: ClassVar[str] = "tokens"
    count: int = Field(1024, ge=1)

    def of(self, length: int, worth: Tensor | None) -> int:
        return self.count


class Share(Amount):
    """A share of all tokens of the text so far, rounded up: never none."""

    kind: ClassVar[str] = "share"
    share: float = Field(0.25, gt=0, le=1)

    def of(self, length: int, worth: Tensor | None) -> int:
        return max(1, math.ceil(self.share * length - 1e-9))


class Bytes(Amount):
    """As many tokens as fit into so many bytes per layer, for a row whose tokens take `each` bytes in a layer (keys and
    values of all key heads; 2 * Hk * D * bytes of the dtype)."""

    kind: ClassVar[str] = "bytes"
    bytes: int = Field(ge=1)
    each: int = Field(ge=1)

    def of(self, length: int, worth: Tensor | None) -> int:
        return max(1, self.bytes // self.each)


class Enough(Amount):
    """As many as it takes to hold `mass` of all that the slots are worth (ZipVL, 2410.08584): layers with few important
    tokens keep few. For scores that are attention (heavy-hitters, last-queries). most: share of the text, at most."""

    kind: ClassVar[str] = "enough"
    needs_worth: ClassVar[bool] = True
    mass: float = Field(0.975, gt=0, le=1)
    most: float = Field(1.0, gt=0, le=1)

    def of(self, length: int, worth: Tensor | None) -> int:
        assert worth is not None, "an amount that needs what slots are worth was not given it"
        most = max(1, math.ceil(self.most * length))
        if self.mass >= 1.0:
            return most
        falling = worth.clamp(min=0).sort(descending=True).values.cumsum(0)
        if not falling.numel() or not bool(torch.isfinite(falling[-1])) or float(falling[-1]) <= 0:
            return most
        return min(most, 1 + int((falling < self.mass * falling[-1]).sum()))


class LayerBudget(Part):
    """Family: factors on the amount, layer by layer, whose mean is 1."""

    def start(self) -> LayerBudget:
        """Remembers nothing: this one itself."""
        return self

    def factors(self, layers: int) -> list[float]:
        """One for each layer."""
        raise NotImplementedError(f"{type(self).__name__} has no factors().")


class SameLayers(LayerBudget):
    """All layers alike."""

    kind: ClassVar[str] = "same"

    def factors(self, layers: int) -> list[float]:
        return [1.0] * layers


class Pyramid(LayerBudget):
    """First layers more, last layers less, in a straight line (PyramidKV, 2406.02069). steep: the first layer keeps this
    many times what the last one keeps."""

    kind: ClassVar[str] = "pyramid"
    steep: float = Field(4.0, ge=1)

    def factors(self, layers: int) -> list[float]:
        last = 2.0 / (1.0 + self.steep)
        step = last * (self.steep - 1.0) / max(1, layers - 1)
        return [1.0] if layers == 1 else [self.steep * last - step * layer for layer in range(layers)]


class HeadBudget(Part):
    """Family: how the key heads of a layer share what it keeps. `choose` says which slots stay.

    even: do all heads of a row keep the same number of slots?
    """

    even: ClassVar[bool] = True

    def start(self) -> HeadBudget:
        """Remembers nothing: this one itself."""
        return self

    def choose(self, worth: Tensor, held: Tensor, count: Tensor) -> Tensor:
        """Slots that stay, bool [B, 1 or Hk, S]: of each row count int64 [B] for each head, the worthiest of those that
        `held`, bool [B, 1 or Hk, S], names (all of them where there are fewer). worth: float32 [B, 1 or Hk, S], +inf: in
        any case."""
        raise NotImplementedError(f"{type(self).__name__} has no choose().")


class OwnHeads(HeadBudget):
    """Each head keeps its own worthiest, all heads equally many."""

    kind: ClassVar[str] = "own"

    def choose(self, worth: Tensor, held: Tensor, count: Tensor) -> Tensor:
        return top(worth.masked_fill(~held, -math.inf), count[:, None]) & held


class TogetherHeads(HeadBudget):
    """All heads keep the same tokens, those worth most to all of them together (each head's shares of its total, as
    votes)."""

    kind: ClassVar[str] = "together"

    def choose(self, worth: Tensor, held: Tensor, count: Tensor) -> Tensor:
        sure = (worth == math.inf).any(1, keepdim=True)
        known = worth.masked_fill(~held | (worth == math.inf), 0.0)
        votes = (known / known.abs().sum(-1, keepdim=True).clamp_min(1e-20)).sum(1, keepdim=True)
        anyone = held.any(1, keepdim=True)
        votes = votes.masked_fill(sure, math.inf).masked_fill(~anyone, -math.inf)
        return top(votes, count[:, None]) & anyone


class AdaptiveHeads(HeadBudget):
    """Heads share the layer's slots by what these are worth (Ada-KV, 2407.11550): the worthiest of all heads stay, but
    each head keeps at least `floor` of an equal share. Memory is that of the slots kept, not of the longest head."""

    kind: ClassVar[str] = "adaptive"
    even: ClassVar[bool] = False
    floor: float = Field(0.2, ge=0, le=1)

    def choose(self, worth: Tensor, held: Tensor, count: Tensor) -> Tensor:
        heads = worth.shape[1]
        if heads == 1:
            return top(worth.masked_fill(~held, -math.inf), count[:, None]) & held
        worth = worth.masked_fill(~held, -math.inf)
        own = top(worth, (count * self.floor).ceil().long()[:, None])
        first = worth.masked_fill(own & held, math.inf)
        stay = top(first.flatten(1), count * heads).view_as(first)
        return stay & held


def top(worth: Tensor, count: Tensor) -> Tensor:
    """The worthiest `count` (int64, broadcast to the leading shape) of the last dimension, exactly so many where there are
    that many: bool. Of equals the later one stays. NaN is worth least."""
    worth = torch.nan_to_num(worth, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    order = worth.flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order).contiguous())
    return (rank < count[..., None]).flip(-1)
