"""What of a language model is left out of a step: layers, or feed-forward blocks. The family, and its members.

The first layer always runs: a cache counts its tokens there. Within one stretch of steps a layer that was left out stays out, so
that no layer misses keys of a token between two that it has.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hasten.drift import Drift, RuleState
from hasten.errors import UsageError
from hasten.part import Part
from hasten.recipe import FromFile
from hasten.samplers.drafters_own.student import loaded
from hasten.step import Step


class Skip(Part):
    """Base of the ways. ffn: does it leave out feed-forward blocks, whose inputs and outputs it has to see?"""

    ffn: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """What it reads of a prompt, as `Drafter.needs`."""
        return frozenset()

    def start(self, layers: int) -> SkipState:
        """State of one text, or batch of them, on a model of so many layers. Raises `UsageError` where it has too few."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class SkipState:
    """The state of a `Skip`; leaves out nothing by default."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def prompt(self, hidden: dict[str, Tensor], mask: Tensor) -> None:
        """The prompt was read, by all layers. hidden: what `needs` names, [B, L, C]; mask int64 [B, L]: 0 for padding."""

    def runs(self, place: int) -> list[bool]:
        """Which layers a token at `place` (of the longest row) is read by."""
        return [True] * self.layers

    def begin(self) -> None:
        """Another token is read."""

    def skips_ffn(self, layer: int) -> bool:
        """Is this layer's feed-forward block left out?"""
        return False

    def saw_ffn(self, layer: int, before: Tensor, after: Tensor) -> None:
        """It ran: the states [B, n, C] before and behind it, the sum included."""


class Layers(Skip):
    """Some layers alone: the `first` ones (an early exit; those of `hasten train sorted-exits` are trained for it, Sorted LLaMA,
    arXiv 2309.08968), or those numbered in `keep`."""

    kind: ClassVar[str] = "layers"
    first: int | None = Field(None, ge=1)
    keep: tuple[int, ...] = ()

    def start(self, layers: int) -> SkipState:
        kept = set(self.keep) or set(range(self.first or max(1, layers // 2)))
        if 0 not in kept or max(kept) >= layers or (self.keep and self.first):
            raise UsageError(
                f"layers: got first={self.first}, keep={list(self.keep)} on a model of {layers} layers. Give one of both: numbers"
                f" from 0 to {layers - 1}, and 0 among them."
            )
        return _Fixed(layers, [number in kept for number in range(layers)])


class _Fixed(SkipState):
    def __init__(self, layers: int, kept: list[bool]) -> None:
        super().__init__(layers)
        self.kept = kept

    def runs(self, place: int) -> list[bool]:
        return self.kept


class ByPlace(Skip):
    """SkipDecode (arXiv 2307.02628): later tokens are read by fewer layers, in a straight line from `most` to `fewest` of them at
    place `length`, for the whole batch alike. Left out are those between the first `warm` and the last ones.

    most, fewest: shares of the layers. The paper fine-tunes the model for it.
    """

    kind: ClassVar[str] = "by-place"
    most: float = Field(0.8, gt=0, le=1)
    fewest: float = Field(0.4, gt=0, le=1)
    length: int = Field(512, ge=1)
    warm: int = Field(1, ge=1)

    def start(self, layers: int) -> SkipState:
        return _ByPlace(layers, self)


class _ByPlace(SkipState):
    def __init__(self, layers: int, part: ByPlace) -> None:
        super().__init__(layers)
        self.part = part
        self.least = layers

    def runs(self, place: int) -> list[bool]:
        part, way = self.part, min(1.0, place / self.part.length)
        share = part.most + (min(part.fewest, part.most) - part.most) * way
        count = max(part.warm, round(share * self.layers), 1)
        first = min(part.warm, count)
        return [number < first or number >= self.layers - (count - first) for number in range(self.layers)]


class Routers(Skip, FromFile):
    """FiRST (arXiv 2410.12513): the prompt decides, by the routers of `hasten train first`, on the mean of its states before each
    layer. path: the `student/` folder of the training.

    In a batch a layer runs where any row wants it. Differs: the routers see the states of the whole model, whose layers have
    all read the prompt, where in training the layers above those left out see what is left.
    """

    kind: ClassVar[str] = "routers"
    FILE: ClassVar[str] = "routers.safetensors"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(f"hidden:{number}" for number in range(1, len(self._weights()["bias"]) + 1))

    def start(self, layers: int) -> SkipState:
        weights = self._weights()
        if len(weights["bias"]) != layers - 1:
            raise UsageError(
                f"routers: '{self.place}' is for a model of {len(weights['bias']) + 1} layers, and this one has {layers}."
            )
        return _Routed(layers, weights)

    def _weights(self) -> dict[str, Tensor]:
        return loaded(self.place / self.FILE, "first")


class _Routed(SkipState):
    def __init__(self, layers: int, weights: dict[str, Tensor]) -> None:
        super().__init__(layers)
        self.weights = weights
        self.wanted: Tensor | None = None  # bool [layers - 1], of the prompt
        self.kept = [True] * layers

    def prompt(self, hidden: dict[str, Tensor], mask: Tensor) -> None:
        wanted = []
        for number in range(1, self.layers):
            states = hidden[f"hidden:{number}"].float()
            here = mask[..., None].to(states)
            mean = (states * here).sum(1) / here.sum(1).clamp(min=1)
            weight = self.weights["weight"][number - 1].to(mean)
            said = F.layer_norm(mean, mean.shape[1:]) @ weight + self.weights["bias"][number - 1].to(mean)
            wanted.append((said >= 0).any())
        self.wanted = torch.stack(wanted) if wanted else None

    def runs(self, place: int) -> list[bool]:
        """Waits for the device where the prompt is new."""
        if self.wanted is not None:
            self.kept, self.wanted = [True, *self.wanted.tolist()], None
        return self.kept


class FeedForward(Skip):
    """FFN-SkipLLM (arXiv 2404.03865): once a feed-forward block hardly turns a token's states, those of the next layers are left
    out; attention always runs, so that keys and values are complete.

    rule: the drift gate, asked layer by layer. The change it sees is 1 - cos(states before, states behind) of the last block
    that ran, the largest of the batch; limit: below which blocks are left out (the paper's threshold on the cosine is 1 less
    this), max_skips: how many in a row, warmup and tail: shares of the layers, first and last, that always run.
    """

    kind: ClassVar[str] = "feed-forward"
    ffn: ClassVar[bool] = True
    rule: Drift = Drift(limit=0.05, accumulate=False, max_skips=2, warmup=0.2, tail=0.2)

    def start(self, layers: int) -> SkipState:
        return _FeedForward(layers, self.rule)


class _FeedForward(SkipState):
    def __init__(self, layers: int, rule: Drift) -> None:
        super().__init__(layers)
        self.rule = rule
        self.begin()

    def begin(self) -> None:
        self.state: RuleState = self.rule.start()
        self.change: float | None = None

    def skips_ffn(self, layer: int) -> bool:
        return self.state.skip(Step(layer, self.layers, 1 - layer / self.layers), self.change)

    def saw_ffn(self, layer: int, before: Tensor, after: Tensor) -> None:
        cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
        self.change = float((1 - cosine).amax())  # one look at the device for each block that runs
