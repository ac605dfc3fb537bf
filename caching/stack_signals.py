"""Signals seen from inside: how far has the computation moved, judged at the gate of the first block left out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import layer_norm

from hasten.caching.spans import Piece
from hasten.drift import relative_l1
from hasten.part import Part
from hasten.step import Step


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known when it has to be decided whether blocks run.

    streams: what the first block that may be left out is called with, the longest stream first. lead: what the
    leading blocks added to each stream; empty without a lead. first: the longest stream where it enters block 0.
    others: the further floating-point tensors that block 0 is called with (modulation, timestep embedding, text).
    """

    streams: list[Tensor]
    lead: list[Tensor] = field(default_factory=list)
    first: Tensor | None = None
    others: list[Tensor] = field(default_factory=list)


class StackSignalState(Protocol):
    """Running state of a signal for one branch of one run."""

    def measure(self, step: Step, seen: Evidence) -> Tensor | float | None:
        """Relative change at `step`, a 0-d tensor or a host number; None when unknown. Asked once per step."""

    def computed(self, step: Step, seen: Evidence) -> None:
        """`step` is computed, not skipped."""

    def learned(self, step: Step, piece: Piece, residual: Tensor) -> None:
        """What the blocks of `piece` added to the longest stream at the computed `step`."""

    def tensors(self) -> list[Tensor]:
        """What is held, so that bytes can be counted."""


class StackSignal(Part):
    """Family of signals that are seen from inside.

    needs_lead: whether leading blocks have to run for it. signed: as for the signals of whole networks (`Signal`).
    """

    needs_lead: ClassVar[bool] = False
    signed: ClassVar[bool] = False

    @property
    def remark(self) -> str:
        """What a user should know about missing calibration; empty when there is nothing to say."""
        return ""

    def start(self) -> StackSignalState:
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class LeadChange(StackSignal):
    """Relative L1 change of the leading blocks' residual since the last computed step (first-block caching)."""

    kind: ClassVar[str] = "lead_change"
    needs_lead: ClassVar[bool] = True

    def start(self) -> StackSignalState:
        return _LeadChange()


class BlockInput(StackSignal):
    """Relative L1 change, since the previous step, of what the first block is called with (TeaCache, arXiv 2411.19108).

    The paper measures the modulated input LN(h)(1 + s) + b, which is made inside a block. Seen from outside are h and
    the tensors that s and b are made of; ours is the change of LN(h) plus the largest change among those tensors, to
    first order a bound of the paper's. of: "stream" takes the first term only, "modulation" the second (the paper's
    official choice for Wan), "both" their sum; a network that hands its blocks no modulation has the first only.

    polynomial: coefficients, highest power first, that turn the change into the expected change of the output; at
    most of degree 4 as in the paper, and (1, 0) for none. domain: range of changes on which it was fitted;
    a change outside is moved to its border, because a polynomial of degree 4 means nothing there.
    """

    kind: ClassVar[str] = "block_input"
    of: Literal["both", "stream", "modulation"] = "both"
    polynomial: tuple[float, ...] = Field((1.0, 0.0), min_length=1, max_length=5)
    domain: tuple[float, float] | None = None

    @property
    def remark(self) -> str:
        if self.polynomial != (1.0, 0.0):
            return ""
        return "the change of the first block's input is taken as it is; `hasten profile` fits the polynomial of TeaCache"

    def start(self) -> StackSignalState:
        return _BlockInput(self)


class Magnitude(StackSignal):
    """How far the magnitude of the blocks' residual will have moved since the last computed step (MagCache, 2506.09045).

    With g_t = mean over tokens of |r_t| / |r_(t-1)| and p_t = the product of g since the last computed step, a step
    adds |1 - p_t|. ratios: g_t of each step of a recorded run, the first being 1 (`hasten profile` writes them). A run of
    another length reads the recorded log-magnitudes at the same share of the run. Empty: g is measured online as
    the ratio between the last two computed steps, spread evenly over the steps between them; the paper calibrates.
    """

    kind: ClassVar[str] = "magnitude"
    ratios: tuple[float, ...] = ()

    @property
    def remark(self) -> str:
        if self.ratios:
            return ""
        return "magnitude ratios were not calibrated, so they are measured online; `hasten profile` records them"

    def start(self) -> StackSignalState:
        return _Magnitude(self.ratios)


class _LeadChange:
    def __init__(self) -> None:
        self.reference: list[Tensor] = []

    def measure(self, step: Step, seen: Evidence) -> Tensor | None:
        if not self.reference or not seen.lead or self.reference[0].shape != seen.lead[0].shape:
            return None
        return relative_l1(seen.lead[0], self.reference[0])

    def computed(self, step: Step, seen: Evidence) -> None:
        self.reference = seen.lead[:1]

    def learned(self, step: Step, piece: Piece, residual: Tensor) -> None:
        return None

    def tensors(self) -> list[Tensor]:
        return self.reference


class _BlockInput:
    def __init__(self, signal: BlockInput) -> None:
        self.signal = signal
        self.stream: Tensor | None = None
        self.others: list[Tensor] = []

    def measure(self, step: Step, seen: Evidence) -> Tensor | None:
        change = self._change(seen)
        return None if change is None else rescaled(change, self.signal.polynomial, self.signal.domain)

    def computed(self, step: Step, seen: Evidence) -> None:
        return None

    def _change(self, seen: Evidence) -> Tensor | None:
        """Change since the previous step, whether that was computed or not; the present becomes the reference."""
        assert seen.first is not None
        before, earlier = self.stream, self.others
        wants_stream = self.signal.of != "modulation" or not seen.others
        # A normalised copy: a block may change its input in place.
        self.stream = layer_norm(seen.first, seen.first.shape[-1:]) if wants_stream else None
        self.others = [other.clone() for other in seen.others] if self.signal.of != "stream" else []
        parts: list[Tensor] = []
        if self.stream is not None:
            if before is None or before.shape != self.stream.shape:
                return None
            parts.append(relative_l1(self.stream, before))
        if self.others:
            if [t.shape for t in self.others] != [t.shape for t in earlier]:
                return None
            changes = [_change_of(new, old) for new, old in zip(self.others, earlier, strict=True)]
            parts.append(torch.stack(changes).max())
        return torch.stack(parts).sum()

    def learned(self, step: Step, piece: Piece, residual: Tensor) -> None:
        return None

    def tensors(self) -> list[Tensor]:
        return self.others + ([] if self.stream is None else [self.stream])


class _Magnitude:
    def __init__(self, ratios: tuple[float, ...]) -> None:
        self.ratios = ratios
        self.product = 1.0
        self.index = -1
        self.norms: dict[Piece, tuple[int, Tensor]] = {}
        self.rates: dict[Piece, Tensor] = {}

    def measure(self, step: Step, seen: Evidence) -> Tensor | float | None:
        if self.index < 0:
            return None
        if self.ratios:
            self.product *= ratio_at(self.ratios, step)
            return abs(1.0 - self.product)
        if not self.rates:
            return None
        rate = torch.stack(list(self.rates.values())).mean()
        return (1.0 - rate ** (step.index - self.index)).abs()

    def computed(self, step: Step, seen: Evidence) -> None:
        self.product, self.index = 1.0, step.index

    def learned(self, step: Step, piece: Piece, residual: Tensor) -> None:
        if self.ratios:
            return
        norms = token_norms(residual)
        index, old = self.norms.get(piece, (step.index, norms))
        if step.index > index and old.shape == norms.shape:
            self.rates[piece] = (norms / old).mean() ** (1.0 / (step.index - index))
        self.norms[piece] = (step.index, norms)

    def tensors(self) -> list[Tensor]:
        return [norms for _, norms in self.norms.values()] + list(self.rates.values())


def rescaled(change: Tensor, polynomial: tuple[float, ...], domain: tuple[float, float] | None) -> Tensor:
    """The polynomial (highest power first) of a 0-d change held within `domain`; never below 0. NaN stays NaN."""
    x = change if domain is None else change.clamp(*domain)
    value = torch.zeros_like(x)
    for coefficient in polynomial:
        value = value * x + coefficient
    return value.clamp_min(0.0)


def ratio_at(ratios: tuple[float, ...], step: Step) -> float:
    """Ratio of magnitudes from the step before `step` to `step`, read off ratios recorded on another number of steps."""
    if step.index == 0:
        return 1.0
    logs = [0.0]
    for ratio in ratios[1:]:
        logs.append(logs[-1] + math.log(max(ratio, 1e-6)))

    def level(index: int) -> float:
        spot = index / max(1, step.total - 1) * (len(logs) - 1)
        low = min(int(spot), len(logs) - 1)
        high = min(low + 1, len(logs) - 1)
        return logs[low] + (spot - low) * (logs[high] - logs[low])

    return math.exp(level(step.index) - level(step.index - 1))


def token_norms(residual: Tensor) -> Tensor:
    """L2 norm of each token's residual, float32; shape of `residual` without its last dimension."""
    norms: Tensor = residual.float().norm(dim=-1).clamp_min(1e-12)
    return norms


def _change_of(new: Tensor, old: Tensor) -> Tensor:
    """Relative L1 change; 0 for tensors with infinities, which are masks and no modulation."""
    change = relative_l1(new, old)
    return torch.where(torch.isinf(old).any(), torch.zeros_like(change), change)
