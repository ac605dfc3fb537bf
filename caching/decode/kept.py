"""The policy on the `kv` axis of a causal language model: which tokens stay in the cache, and in how many bits.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.caching.decode.amount import Amount, HeadBudget, LayerBudget, OwnHeads, SameLayers
from hasten.caching.decode.codec import Codec
from hasten.caching.decode.lazy import LazyState, LazyTokens
from hasten.caching.decode.prompt import PromptChoice
from hasten.caching.decode.score import Recency, Seen, SlotScore, SlotScoreState
from hasten.caching.decode.slots import Slots
from hasten.caching.decode.turns import Turns
from hasten.errors import RecipeError
from hasten.part import Part
from hasten.recipe import KVPolicy


class Shared(Part):
    """Prefixes that rows share are computed and held once, and read for all of these rows by one matrix product (Hydragen,
    2402.05099): the samples of one prompt, the beams of a search, and what all prompts of a batch begin with.

    least: tokens of a common beginning that is worth it.
    """

    least: int = Field(64, ge=1)


class KeptCache(KVPolicy):
    """Keys and values that are kept while a causal language model generates.

    score: what a slot is worth; amount: how many slots of each row stay (None: all). The first `sinks` tokens stay in any
    case, and the newest `window` or, where that is more, the share `recent` of what stays: they are part of the amount.
    when: "prompt": after each piece of a prompt (a turn of a conversation), and what is generated stays; "always": while
    generating, too, once there are `every` more than the amount. layers, heads: who gets how much of the amount. codec: the
    form of what is older than its residual. shared: prefixes that are held once; prompt: which tokens of a prompt are read at
    all; both for `generate` alone; lazy: which tokens deeper layers read. Without amount and codec the cache is the model's own, token for token.

    Positions stay those of the text: what is left is not moved together, as far as the model can tell.
    """

    kind: ClassVar[str] = "kept"
    score: SlotScore = Recency()
    amount: Amount | None = None
    sinks: int = Field(4, ge=0)
    window: int = Field(0, ge=0)
    recent: float = Field(0.0, ge=0, le=1)
    when: Literal["prompt", "always"] = "always"
    every: int = Field(1, ge=1)
    layers: LayerBudget = SameLayers()
    heads: HeadBudget = OwnHeads()
    codec: Codec | None = None
    shared: Shared | None = None
    prompt: PromptChoice | None = None
    lazy: LazyTokens | None = None

    @model_validator(mode="after")
    def _fits(self) -> KeptCache:
        if self.codec is not None and self.amount is not None and not self.heads.even:
            raise RecipeError(
                f"heads of kind {self.heads.kind!r} hold different numbers of tokens, which codecs cannot pack. Take heads of"
                " kind 'own' or 'together' with a codec."
            )
        if self.shared is not None and (self.amount, self.codec, self.prompt) != (None, None, None):
            raise RecipeError(
                "a shared prefix is held once for several rows, and rows choose, evict and pack for themselves. Take `shared`"
                " without amount, codec and prompt."
            )
        if self.lazy is not None and (self.amount, self.codec, self.shared, self.prompt) != (None, None, None, None):
            raise RecipeError(
                "lazy keeps the hidden states of tokens that layers left out, to compute what is missing later, and nothing may"
                " leave or change behind its back. Take `lazy` without amount, codec, shared and prompt."
            )
        return self

    def start(self, layers: int) -> KeptState:
        """State of one cache for a model of so many layers."""
        return KeptState(self, layers)


@dataclass(slots=True)
class LayerFacts:
    """What happened at one layer of one cache. seen, evicted: tokens, added over rows (means over heads). share: of what
    the slots were worth, the part that stayed, at each eviction; None where a worth is not attention."""

    layer: int
    seen: float = 0.0
    evicted: float = 0.0
    evictions: int = 0
    share: float | None = None
    packed: int = 0


class KeptState:
    """Scores of one cache, layer by layer, and what was done. refused: why layers kept more than they should. lazy: hidden
    states of tokens that deeper layers left out. turns: how the model turns keys, where somebody needs to know."""

    def __init__(self, part: KeptCache, layers: int) -> None:
        self.part = part
        self.lazy = LazyState(part.lazy, layers) if part.lazy is not None else None
        self.turns: Turns | None = None
        self.factors = part.layers.factors(layers)
        self.scores: list[SlotScoreState] = [part.score.start() for _ in range(layers)]
        self.facts = [LayerFacts(layer) for layer in range(layers)]
        self.refused: list[str] = []

    @property
    def evicts(self) -> bool:
        """Does anything ever leave?"""
        return self.part.amount is not None

    def after(self, slots: Slots, seen: Seen, lengths: Sequence[int]) -> None:
        """A layer has read and committed new tokens. lengths: tokens of each row's text so far."""
        facts = self.facts[seen.layer]
        facts.seen = float(sum(lengths))
        if self.part.amount is not None:
            score, due = self.scores[seen.layer], seen.prompt or self.part.when == "always"
            if due or self.part.score.lasting:
                score.learn(slots, seen)
            if due:
                self._evict(slots, seen, lengths)
            if self.part.when == "prompt" and not self.part.score.lasting:
                score.forget()
        codec = self.part.codec
        if codec is not None and (seen.prompt or not codec.prompts_only):
            form, least = codec.form(slots.place[..., slots.behind :], self.turns), codec.least(slots.k.shape[1] * slots.k.shape[3])
            facts.packed += slots.pack(form, codec.residual, codec.group, least)

    def _evict(self, slots: Slots, seen: Seen, lengths: Sequence[int]) -> None:
        amount, factor = self.part.amount, self.factors[seen.layer]
        assert amount is not None
        slack = 0 if seen.prompt else self.part.every - 1
        worth = None
        if amount.needs_worth:
            worth = self._worth(slots, seen)
            if worth is None:
                return
            goals = self._needed(amount, slots, worth, lengths)
        else:
            goals = [amount.of(length, None) for length in lengths]
        goals = [max(1, round(goal * factor)) for goal in goals]
        if all(held <= goal + slack for held, goal in zip(slots.tokens, goals, strict=True)):
            return
        worth = self._worth(slots, seen) if worth is None else worth
        if worth is None:
            return
        before = list(slots.tokens)
        mask = self.choose(worth, slots.place, goals, lengths)
        self._note(worth, mask, slots.place, self.facts[seen.layer])
        slots.keep(mask)
        self.facts[seen.layer].evicted += sum(before) - sum(slots.tokens)

    def _needed(self, amount: Amount, slots: Slots, worth: Tensor, lengths: Sequence[int]) -> list[int]:
        held = (slots.place >= 0).any(1)
        total = worth.masked_fill(slots.place < 0, 0.0).expand(-1, max(worth.shape[1], slots.place.shape[1]), -1).sum(1)
        return [amount.of(length, total[row][held[row]]) for row, length in enumerate(lengths)]

    def _worth(self, slots: Slots, seen: Seen) -> Tensor | None:
        """What slots are worth; None, and a reason, where that is not finite: then nothing is evicted."""
        worth = self.scores[seen.layer].worth(slots, seen)
        if bool(torch.isfinite(worth.masked_fill(slots.place < 0, 0.0)).all()):
            return worth
        sentence = f"layer {seen.layer} kept all its tokens: what they are worth ({self.part.score.kind}) is not finite"
        if sentence not in self.refused:
            self.refused.append(sentence)
        return None

    def choose(self, worth: Tensor, place: Tensor, goals: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """The slots that stay: bool [B, 1 or Hk, S]; goals: how many of each row, for each head."""
        part, device = self.part, worth.device
        sinks = [min(part.sinks, max(0, goal - 1)) for goal in goals]
        near = [
            length - min(max(1, part.window, math.floor(part.recent * goal)), goal - sink)
            for goal, sink, length in zip(goals, sinks, lengths, strict=True)
        ]
        first, newest = (torch.tensor(x, device=device)[:, None, None] for x in (sinks, near))
        sure = (place < first) | (place >= newest)
        planes = max(sure.shape[1], worth.shape[1])
        sure, worth = sure.expand(-1, planes, -1), worth.expand(-1, planes, -1)
        held = (place >= 0).expand(-1, max(place.shape[1], 1), -1)
        return part.heads.choose(worth.masked_fill(sure, math.inf), held, torch.tensor(goals, device=device))

    def _note(self, worth: Tensor, mask: Tensor, place: Tensor, facts: LayerFacts) -> None:
        facts.evictions += 1
        known = worth.masked_fill(place < 0, 0.0)
        if self.part.score.is_mass and float(known.sum()) > 0:
            share = float(known.masked_fill(~mask, 0.0).sum() / known.sum())
            facts.share = share if facts.share is None else min(facts.share, share)

    def rows(self, index: Tensor) -> None:
        """The rows changed places (beams, samples of one prompt): int64 [m]."""
        for score in self.scores:
            score.rows(index)
        if self.lazy is not None:
            self.lazy.rows(index)

    @property
    def bytes(self) -> int:
        """Bytes held beside the slots."""
        noted = sum(t.numel() * t.element_size() for score in self.scores for t in score.tensors())
        return noted + (self.turns.bytes if self.turns else 0) + (self.lazy.bytes if self.lazy else 0)
