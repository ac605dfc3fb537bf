"""What a slot is worth: the family, and the scores that go by the keys alone.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.decode.slots import Slots
from hasten.part import Part


@dataclass(frozen=True, slots=True)
class Seen:
    """What a layer's attention has just read and written; all of it is committed.

    layer: its number. q [B, Hq, n, D]: the new queries, positions applied; at int [B, n]: their places (negative: padding,
    or a draft that was not accepted). k [B, Hk, S, D], v: all that is committed. scale: of the logits. prompt: were the new
    tokens a piece of a prompt, rather than generated ones? module, hidden, named: the attention module that was called,
    its input [B, n, width] and its keyword arguments, for scores of other libraries; None where nobody asked for them.
    """

    layer: int
    q: Tensor
    at: Tensor
    k: Tensor
    v: Tensor
    scale: float
    prompt: bool
    window: int | None = None
    module: Any = None
    hidden: Tensor | None = None
    named: Any = None


class SlotScore(Part):
    """Family of the scores. A score may remember things of slots in `Slots.notes`, which move with them.

    asks_host: must `Seen` have the module and its input? is_mass: is what a slot is worth the attention it got, so that the
    share of it that stays means something? lasting: does what generated tokens attended to count after the next piece of a
    prompt? Else a policy that evicts after prompts alone need not remember it.
    """

    asks_host: ClassVar[bool] = False
    is_mass: ClassVar[bool] = False
    lasting: ClassVar[bool] = True

    def start(self) -> SlotScoreState:
        """State of one layer."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class SlotScoreState:
    """The state of a `SlotScore` for one layer and cache."""

    def learn(self, slots: Slots, seen: Seen) -> None:
        """New tokens were read and committed."""

    def worth(self, slots: Slots, seen: Seen) -> Tensor:
        """What each slot is worth, float32 [B, 1 or Hk, S]; larger is better. Where a slot holds nothing: anything."""
        raise NotImplementedError

    def forget(self) -> None:
        """What is remembered beside the notes is not needed until the next prompt; for scores that are not lasting."""

    def rows(self, index: Tensor) -> None:
        """The rows changed places, as in `Slots.rows`."""

    def tensors(self) -> list[Tensor]:
        """What it holds beside the notes."""
        return []


class Recency(SlotScore):
    """The newest are worth most: with sinks, this is StreamingLLM (2309.17453).

    Difference: keys keep the positions they were computed with; the paper counts positions inside the cache, which a
    model without trained long positions needs beyond its trained length.
    """

    kind: ClassVar[str] = "recency"

    def start(self) -> SlotScoreState:
        return _Recency()


class _Recency(SlotScoreState):
    def worth(self, slots: Slots, seen: Seen) -> Tensor:
        return slots.place.float()


class KeyNorm(SlotScore):
    """Keys of small length are worth most (Knorm, 2406.11430): -|k|. Positions do not change a key's length."""

    kind: ClassVar[str] = "key-norm"

    def start(self) -> SlotScoreState:
        return _KeyNorm()


class _KeyNorm(SlotScoreState):
    def worth(self, slots: Slots, seen: Seen) -> Tensor:
        worth: Tensor = -seen.k.float().norm(dim=-1)
        return worth


class AnyOf(SlotScore):
    """Slots drawn by lot: the control that every score has to beat. The lot depends on seed, layer and place alone."""

    kind: ClassVar[str] = "lot"
    seed: int = Field(0, ge=0)

    def start(self) -> SlotScoreState:
        return _AnyOf(self.seed)


class _AnyOf(SlotScoreState):
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def worth(self, slots: Slots, seen: Seen) -> Tensor:
        from hasten.noise import uniform

        place = slots.place.long()
        seed, layer = torch.full_like(place, self.seed), torch.full_like(place, seen.layer)
        each = uniform(seed, layer, place, seen.k.shape[1])
        own: Tensor = each[:, 0] if place.shape[1] == 1 else each.diagonal(dim1=1, dim2=3)  # [B, S, Hk]
        worth: Tensor = own.movedim(-1, 1).float()
        return worth
