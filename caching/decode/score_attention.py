"""Scores that go by the attention that slots got: H2O, Keyformer, SnapKV.

Shapes: see `hasten.caching.decode`; w queries of the newest tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.decode.mass import mass
from hasten.caching.decode.score import Seen, SlotScore, SlotScoreState
from hasten.caching.decode.slots import Slots
from hasten.noise import gumbel


class HeavyHitters(SlotScore):
    """All the attention that a slot has got so far (H2O, 2306.14048), added over the query heads of its key head.

    fade: factor on what was got before, at each step; 1: the paper's plain sum. Attention that was paid to a slot before
    others were evicted counts as it was paid.
    """

    kind: ClassVar[str] = "heavy-hitters"
    is_mass: ClassVar[bool] = True
    fade: float = Field(1.0, gt=0, le=1)

    def start(self) -> SlotScoreState:
        return _Heavy(self.fade)


class _Heavy(SlotScoreState):
    def __init__(self, fade: float) -> None:
        self.fade = fade

    def learn(self, slots: Slots, seen: Seen) -> None:
        new = mass(seen.q, seen.k, seen.at, slots.place, seen.scale, window=seen.window)
        old = slots.notes.get("got")
        slots.notes["got"] = new if old is None else old * self.fade + new

    def worth(self, slots: Slots, seen: Seen) -> Tensor:
        return slots.notes["got"]


class Keyformer(SlotScore):
    """Attention got under noise (2403.09054): softmax((logits + Gumbel noise) / tau), added up; tau = first + rise * t
    after t generated tokens, so that scores level out while the cache loses tokens.

    Defaults are the official code's. The noise of a place is a hash of seed, layer and place, the same at every step, so
    a text's tokens do not depend on who else is in the batch. That code only masks what it drops; here it leaves.
    """

    kind: ClassVar[str] = "keyformer"
    is_mass: ClassVar[bool] = True
    first: float = Field(1.0, gt=0)
    rise: float = Field(0.01, ge=0)
    seed: int = Field(0, ge=0)

    def start(self) -> SlotScoreState:
        return _Keyformer(self)


class _Keyformer(SlotScoreState):
    def __init__(self, part: Keyformer) -> None:
        self.part, self.steps = part, 0

    def learn(self, slots: Slots, seen: Seen) -> None:
        if not seen.prompt:
            self.steps += seen.q.shape[2]
        place = slots.place.long()
        noise = gumbel(torch.full_like(place, self.part.seed), torch.full_like(place, seen.layer), place, 1)[..., 0]
        tau = self.part.first + self.part.rise * self.steps
        new = mass(seen.q, seen.k, seen.at, slots.place, seen.scale, window=seen.window, noise=noise, tau=tau)
        old = slots.notes.get("got")
        slots.notes["got"] = new if old is None else old + new

    def worth(self, slots: Slots, seen: Seen) -> Tensor:
        return slots.notes["got"]


class LastQueries(SlotScore):
    """The attention of the newest `queries` queries, smoothed over `smooth` neighbouring slots (SnapKV, 2404.14469).

    After a prompt these are its last queries. Between generated tokens they are the last ones generated, so that
    compressing again while a text or a conversation grows follows what is asked now (LoopServe, 2507.13681, progressive
    compression). Smoothing is by the mean (as the peers' code); the newest queries' own slots are what a recipe's
    `window` is for.
    """

    kind: ClassVar[str] = "last-queries"
    is_mass: ClassVar[bool] = True
    lasting: ClassVar[bool] = False
    queries: int = Field(32, ge=1)
    smooth: int = Field(5, ge=1)

    def start(self) -> SlotScoreState:
        return _LastQueries(self)


class _LastQueries(SlotScoreState):
    def __init__(self, part: LastQueries) -> None:
        self.part = part
        self.q = self.at = torch.empty(0)

    def learn(self, slots: Slots, seen: Seen) -> None:
        both = self.q.numel() and self.q.shape[0] == seen.q.shape[0]
        q = torch.cat([self.q, seen.q], 2) if both else seen.q
        at = torch.cat([self.at, seen.at], 1) if both else seen.at
        # Queries that ask nothing (padding, refused drafts) make room for those that do; the order of the rest is kept.
        order = (at >= 0).to(torch.uint8).argsort(dim=1, stable=True)[:, -self.part.queries :]
        self.at = at.gather(1, order)
        self.q = q.gather(2, order[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))

    def worth(self, slots: Slots, seen: Seen) -> Tensor:
        got = mass(self.q, seen.k, self.at, slots.place, seen.scale, window=seen.window)
        width = self.part.smooth
        if width == 1:
            return got
        padded = (width // 2, (width - 1) // 2)
        if not slots.holes:
            return torch.nn.functional.avg_pool1d(torch.nn.functional.pad(got, padded), width, stride=1)
        # Neighbours are tokens, not slots: those that hold nothing stand behind all others meanwhile.
        order = (slots.place < 0).to(torch.uint8).argsort(dim=-1, stable=True).expand_as(got)
        smooth = torch.nn.functional.avg_pool1d(torch.nn.functional.pad(got.gather(-1, order), padded), width, stride=1)
        return torch.empty_like(got).scatter_(-1, order, smooth)

    def forget(self) -> None:
        self.q = self.at = torch.empty(0)

    def rows(self, index: Tensor) -> None:
        if self.q.numel():
            self.q, self.at = self.q.index_select(0, index), self.at.index_select(0, index)

    def tensors(self) -> list[Tensor]:
        return [self.q, self.at]
