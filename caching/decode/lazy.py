"""LazyLLM (2407.14057): deeper layers read fewer tokens, and a token that is needed later is computed on from where it stopped.

Shapes: see `hasten.caching.decode`; W width of hidden states, L places, m tokens that were left behind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.caching.decode.amount import top
from hasten.caching.decode.mass import mass
from hasten.caching.decode.packed import NONE, stored
from hasten.errors import RecipeError
from hasten.part import Part


class LazyTokens(Part):
    """After some layers, those tokens of the text go on that the last token attended to most there, over all heads; deeper
    layers compute and read these alone. The hidden states of the others are kept. Each new token chooses anew from the whole
    text, and what it needs of them is computed by the deeper layers then, once.

    depths: where choices are made, as shares of the model's layers; shares: of the text so far, which go on there. The newest
    token always does. With shares of 1 nothing is left out. Calls that want every token's logits compute every token.
    """

    kind: ClassVar[str] = "lazy-tokens"
    depths: tuple[float, ...] = (0.4, 0.6, 0.8)
    shares: tuple[float, ...] = Field((0.75, 0.5, 0.25), min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        in_line = all(0 <= one < other < 1 for one, other in zip(self.depths, (*self.depths[1:], 0.999999), strict=True))
        falling = all(1 >= one >= other > 0 for one, other in zip((1.0, *self.shares), self.shares, strict=False))
        if len(self.depths) != len(self.shares) or not in_line or not falling:
            raise RecipeError(
                f"lazy needs as many depths, rising from 0 and below 1, as shares, falling from 1 and above 0; got depths"
                f" {list(self.depths)}, shares {list(self.shares)}."
            )
        return self

    def start(self) -> LazyTokens:
        """Remembers nothing: this one itself."""
        return self

    def after(self, layers: int) -> dict[int, float]:
        """Number of each layer after which tokens are left out -> share that goes on. The last layer is none of them."""
        return {
            min(layers - 2, math.floor(depth * layers)): share
            for depth, share in zip(self.depths, self.shares, strict=True)
            if layers > 1
        }


@dataclass(slots=True)
class LazyFacts:
    """One layer. tokens: of prompts that came, over all rows; read: those of them that it computed; revived: tokens that it
    computed later."""

    tokens: int = 0
    read: int = 0
    revived: int = 0


@dataclass(slots=True)
class Left:
    """Tokens that go no deeper for now: hidden [B, m, W], what their last layer gave; place int32 [B, m], `NONE` where a row
    has fewer."""

    hidden: Tensor
    place: Tensor

    def added(self, hidden: Tensor, place: Tensor) -> Left:
        """With these, [B, n, W] and [B, n], `NONE` for those that are not meant."""
        return Left(torch.cat([self.hidden, hidden], 1), torch.cat([self.place, place], 1)).only()

    def only(self, stays: Tensor | None = None) -> Left:
        """Those that `stays`, bool [B, m], names; the rest is freed. Waits for the device."""
        stays = self.place >= 0 if stays is None else stays & (self.place >= 0)
        width = int(stays.sum(1).max())
        order = stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        place = self.place.masked_fill(~stays, NONE).gather(1, order)
        return Left(_rows_of(self.hidden, order), place)


class LazyState:
    """The state of `LazyTokens` for one cache.

    alive: bool [B, L], by place, what the layers read that are computed now; None: everything. at: int [B, n], the places of
    the tokens that go on, `NONE` for padding; None: all that the model was called with. count: how many these are; again: how many of
    them belong to earlier calls.
    """

    def __init__(self, part: LazyTokens, layers: int) -> None:
        self.shares = part.after(layers)
        self.left: dict[int, Left] = {}
        self.facts = [LazyFacts() for _ in range(layers)]
        self.alive: Tensor | None = None
        self.at: Tensor | None = None
        self.before = torch.empty(0)
        self.count = self.again = 0

    def begin(self, tokens: int, before: Tensor) -> None:
        """A call of the model with so many tokens, over all rows, behind `before`, int [B], tokens of each row."""
        self.alive = self.at = None
        self.count, self.again, self.before = tokens, 0, before

    def weigh(self, layer: int, q: Tensor, k: Tensor, at: Tensor, place: Tensor, lengths: list[int], scale: float) -> None:
        """The attention of a layer's last token says which go on: q [B, Hq, n, D] at places int [B, n], k [B, Hk, S, D] at place
        int [B, 1, S] (`NONE`: not read). lengths: tokens of each row's text."""
        goals = [min(length, math.ceil(self.shares[layer] * length - 1e-9)) for length in lengths]
        if self.alive is None and goals == lengths and not any(left.place.shape[1] for left in self.left.values()):
            return
        got = mass(q[:, :, -1:], k, at[:, -1:], place, scale).sum(1)
        if not bool(torch.isfinite(got).all()):
            return  # nobody can say what counts: all that came so far goes on
        there = place[:, 0]
        got = got.masked_fill(there == at[:, -1:], math.inf).masked_fill(there < 0, -math.inf)
        chosen = top(got, torch.tensor(goals, device=q.device)) & (there >= 0)
        alive = torch.zeros(len(lengths), max(lengths) + 1, dtype=torch.bool, device=q.device)  # the last place is nobody's
        where = torch.where(chosen, there, max(lengths)).long()
        self.alive = alive.scatter_(1, where, True)[:, :-1]

    def go_on(self, layer: int, hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """What the next layer computes: hidden [B, n, W] of tokens at places int [B, n] without those that are left behind, and
        with those that are needed again; in the order of their places, padding in front. Waits for the device."""
        if self.alive is None:
            return hidden, at
        kept = self._among(at)
        held = self.left.get(layer) or Left(hidden[:, :0], at[:, :0].to(torch.int32))
        back = held.only(self._among(held.place))
        leaves = (at >= 0) & ~kept
        if bool(leaves.any()):
            held = held.added(hidden, at.masked_fill(~leaves, NONE).to(torch.int32))
        elif not back.place.shape[1]:
            return hidden, at
        self.left[layer] = held.only(~self._among(held.place))
        hidden = torch.cat([back.hidden, hidden], 1)
        at = torch.cat([back.place.to(at.dtype), at.masked_fill(~kept, NONE)], 1)
        self.count, self.again = torch.stack([(at >= 0).sum(), ((at >= 0) & (at < self.before[:, None])).sum()]).tolist()
        width = int((at >= 0).sum(1).max())
        order = at.argsort(dim=1, stable=True)[:, -width:]
        self.at = at.gather(1, order)
        return _rows_of(hidden, order), self.at

    def _among(self, place: Tensor) -> Tensor:
        """Which of these places, int [B, n], are alive."""
        assert self.alive is not None
        return self.alive.gather(1, place.clamp(min=0).long()) & (place >= 0)

    def read(self, layer: int, new: int, prompt: bool) -> None:
        """A layer has computed the tokens that go on, in a call with so many new ones."""
        facts = self.facts[layer]
        if prompt:
            facts.tokens, facts.read = facts.tokens + new, facts.read + self.count - self.again
        facts.revived += self.again

    def rows(self, index: Tensor) -> None:
        """The rows changed places: int64 [m]."""
        self.left = {
            layer: Left(left.hidden.index_select(0, index), left.place.index_select(0, index)).only()
            for layer, left in self.left.items()
        }

    def shorten(self, lengths: Tensor) -> None:
        """What is behind these ends, int64 [B], goes."""
        self.left = {
            layer: left.only(left.place < lengths.to(left.place.device)[:, None]) for layer, left in self.left.items()
        }

    @property
    def bytes(self) -> int:
        """Bytes of what is left behind."""
        return stored([x for left in self.left.values() for x in (left.hidden, left.place)])


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x [B, n, W] at index int64 [B, m]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
