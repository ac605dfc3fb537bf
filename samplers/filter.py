"""Commit rules that were trained to tell which tokens are final already (Learn2PD, arXiv 2509.25188).

`hasten train learn2pd` (and `hasten train filter`) trains one from a model's own generations. A filter is a safetensors file of a few KiB: two linear
layers and a stamp of the model that it was trained for, and in its metadata which of the two forms it has and above
which probability a slot may be written.

Shapes: B texts, L slots, F inputs per slot, W slots of a block, n rows of inputs, I inputs and O outputs of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.canvas import Canvas
from hasten.errors import UsageError
from hasten.samplers.commit import CommitRule, CommitState
from hasten.samplers.scores import Scores

Form = Literal["slots", "block"]

INPUTS, REACH = 6, 2
"""What `features` gives per slot, and how many slots to each side a filter of the form "slots" looks at."""
FIRST_INPUTS = 5
"""What filters that were trained before there was a sixth look at: the first so many of them."""


class FilterNet(nn.Module):
    """Inputs [n, I] -> logits [n, O] that a slot's token is final: linear, ReLU, linear.

    form "slots": a row is a slot with its neighbours, O = 1; it looks at the first `seen` features. form "block": a row is a
    block of W slots, I = O = W.
    """

    def __init__(self, form: Form, hidden: int = 32, width: int = 32, seen: int = FIRST_INPUTS) -> None:
        super().__init__()
        self.form, self.width, self.seen = form, width, seen
        inputs, outputs = ((2 * REACH + 1) * seen, 1) if form == "slots" else (width, width)
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.second(self.first(inputs).relu())
        return logits


class Learned(CommitRule):
    """Slots that a trained filter takes for final with probability >= `above`.

    It sees of each slot and its two neighbours on either side: confidence, p1 - p2, entropy, whether the slot is
    open, where it stands in the block, and how much of the block is open; so that one filter serves blocks of any size. above None: the probability
    that was calibrated in training for a target rate of false commits. weights: the file; None is for the model's own,
    which a pipeline puts in. Learn2PD's own filter is `LearnedBlock`.
    """

    kind: ClassVar[str] = "learned"
    form: ClassVar[Form] = "slots"
    weights: str | None = None
    above: float | None = Field(None, ge=0, le=1)

    def start(self) -> CommitState:
        """Raises `UsageError` where `weights` is no filter of this form."""
        return _LearnedState(_needed(self), self.above)


class _LearnedState(CommitState):
    def __init__(self, found: Filter, above: float | None) -> None:
        self.net, self.above = found.net, found.above if above is None else above

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        seen = neighbours(features(scores, canvas)[..., : self.net.seen])
        return scores.among(canvas) & (self.chance(seen)[..., 0] >= self.above)

    def chance(self, inputs: Tensor) -> Tensor:
        """Probability that a token is final, [..., O], of inputs [..., I]."""
        if self.net.first.weight.device != inputs.device:
            self.net = self.net.to(inputs.device)
        with torch.no_grad():
            logits: Tensor = self.net(inputs)
        return logits.sigmoid()


class LearnedBlock(CommitRule):
    """Slots that Learn2PD's filter takes for final: it sees the confidences of the whole block, and nothing else.

    As in the paper the block has a fixed number of slots, written ones have the confidence that this evaluation gives
    their best token, and nothing says which they are; slots behind the end of a shorter block are 0. The paper adds a
    quota (`Either`); 0.9 is its threshold.
    """

    kind: ClassVar[str] = "learned-block"
    form: ClassVar[Form] = "block"
    written: ClassVar[bool] = True
    weights: str | None = None
    above: float | None = Field(None, ge=0, le=1)

    def start(self) -> CommitState:
        """Raises `UsageError` where `weights` is no filter of this form."""
        return _LearnedBlockState(_needed(self), self.above)


class _LearnedBlockState(_LearnedState):
    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        among, width = scores.among(canvas), self.net.width
        chance = self.chance(confidences(scores, canvas, width))
        place = canvas.place - canvas.span[:, :1]
        mine = chance.gather(1, place.clamp(0, width - 1))
        return among & (place < width) & (mine >= self.above)


def features(scores: Scores, canvas: Canvas) -> Tensor:
    """Inputs [B, L, F] of a filter: of open slots c, p1 - p2, 1 - exp(-H) and 1; of all slots of the block, where
    they stand in it, (0, 1], and which share of it is open; else 0."""
    among, low, high = scores.among(canvas), canvas.span[:, :1], canvas.span[:, 1:]
    size = (high - low).clamp(min=1)
    place, left = (canvas.place - low + 1) / size, among.sum(1, keepdim=True) / size
    sure = torch.stack([scores.confidence, scores.confidence - scores.second, -(-scores.entropy).expm1()], -1)
    sure = torch.where(among[..., None], sure, 0.0)
    where = torch.where(canvas.active[..., None], torch.stack([place, left.expand_as(place)], -1), 0.0)
    return torch.cat([sure, among[..., None], where], -1)


def neighbours(given: Tensor) -> Tensor:
    """Each slot's features [B, L, F] with those of `REACH` slots to both sides, [B, L, (2 REACH + 1) F]; 0 beyond the
    text."""
    around = F.pad(given, (0, 0, REACH, REACH)).unfold(1, 2 * REACH + 1, 1)
    return around.flatten(2)


def confidences(scores: Scores, canvas: Canvas, width: int) -> Tensor:
    """Confidences of the first `width` slots of each active block, [B, W]; 0 where there is no such slot."""
    place = canvas.span[:, :1] + torch.arange(width, device=canvas.ids.device)
    inside = place < canvas.span[:, 1:]
    known = torch.where(scores.seen, scores.confidence, 0.0)
    return torch.where(inside, known.gather(1, place.clamp(max=canvas.slots - 1)), 0.0)


STAMP = "stamp"
"""Name of the tensor of a filter's file that tells its model."""


@dataclass(frozen=True, slots=True)
class Filter:
    """What a file holds. above: the calibrated probability. stamp: float32 [n], a few weights of the model that it was
    trained for; None in a file that does not say."""

    net: FilterNet
    above: float
    stamp: Tensor | None


def load(weights: str | Path, form: Form) -> Filter:
    """Read a filter. Raises `UsageError` where the file is none of this form."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(weights), "pt") as file:
            told, stored = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"Cannot read the filter {weights}: {error}. Train one with `hasten train filter`.") from None
    if told.get("filter") != form:
        raise UsageError(
            f"{weights} is a filter of the form {told.get('filter', 'none')!r}, and {form!r} is needed."
            " Filters 'slots' go with the rule 'learned', 'block' with 'learned-block'."
        )
    try:
        stamp = stored.pop(STAMP, None)
        hidden, inputs = stored["first.weight"].shape
        net = FilterNet(form, hidden, inputs, inputs // (2 * REACH + 1))
        net.load_state_dict(stored)
        return Filter(net.eval().requires_grad_(False), float(told["above"]), stamp)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UsageError(f"{weights} is damaged: {str(error).splitlines()[0]}. Train it again.") from None


def _needed(rule: Learned | LearnedBlock) -> Filter:
    if rule.weights is None:
        raise UsageError(
            f"The commit rule {rule.kind!r} has no filter: only a TextDiffusionPipeline can put in its model's own. Name the"
            " file as its weights; `hasten train filter` writes one."
        )
    return load(rule.weights, rule.form)
