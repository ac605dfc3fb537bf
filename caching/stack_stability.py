"""SADA's stability, read off the stream that enters the blocks: of a whole step, and of every token apart."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.signals_stability import second_difference
from hasten.caching.spans import Piece
from hasten.caching.stack_signals import Evidence, StackSignal, StackSignalState
from hasten.caching.tokens import Tokens, TokenState, evenly, most
from hasten.forecast import combine
from hasten.forecast_adams import adams_bashforth
from hasten.step import Step

POINTS = 4
"""Steps of the path that the criterion needs: three chords and the point where the last one ends."""


class StreamPath:
    """The last `POINTS` streams that entered the blocks, and SADA's product (x - x^) * D2 y of them.

    The patch embedding is affine, so the path of a token's stream over `Step.time` is the path of its patch of latents,
    and the chord between two steps is the velocity y = dx/dt that the solver used there, whatever the network predicts
    and however the branches were combined. Skipped steps count: the blocks' entry is known there, too.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.streams: list[Tensor] = []

    def see(self, time: float, stream: Tensor) -> None:
        if self.streams and self.streams[0].shape != stream.shape:
            self.times, self.streams = [], []
        if time in self.times:  # Heun-type solvers evaluate a time twice: the newer one counts
            spot = self.times.index(time)
            del self.times[spot], self.streams[spot]
        self.times = [*self.times, time][-POINTS:]
        self.streams = [*self.streams, stream][-POINTS:]

    def deviation_and_bend(self) -> tuple[Tensor, Tensor] | None:
        """(x - x^, D2 y), float32, shape of a stream; None before `POINTS` steps.

        x^ is the third-order Adams-Bashforth step from the last point but one; D2 the second difference of the chords.
        """
        if len(self.times) < POINTS:
            return None
        lengths = [b - a for a, b in pairwise(self.times)]
        # Differences first: a stream that stands still must give exactly nothing.
        chords = [(b.float() - a.float()) / h for (a, b), h in zip(pairwise(self.streams), lengths, strict=True)]
        nodes = self.times[:-1]
        off = [-weight for weight in adams_bashforth(nodes, nodes[-1], self.times[-1])]
        off[-1] += lengths[-1]
        return combine(off, chords), combine(second_difference(nodes), chords)


class PathStability(StackSignal):
    """SADA's criterion (arXiv 2507.17135) on the stream that enters the blocks: negative where the path is stable.

    Cosine between x - x^ and D2 y, both over all tokens and rows. Differs from the paper as `StreamPath` says; the
    network's own `stability` asks the output of one branch, this one the path that all branches have made.
    Signed: goes with `Drift(limit=0, accumulate=False)`. Unknown, so computed, on the first `POINTS` - 1 steps. In
    half precision the second difference of neighbouring steps drowns in rounding; then it says little.
    """

    kind: ClassVar[str] = "path_stability"
    signed: ClassVar[bool] = True

    def start(self) -> StackSignalState:
        return _PathStability()


class _PathStability:
    def __init__(self) -> None:
        self.path = StreamPath()

    def measure(self, step: Step, seen: Evidence) -> Tensor | None:
        if seen.first is None:
            return None
        self.path.see(step.time, seen.first)
        found = self.path.deviation_and_bend()
        if found is None:
            return None
        off, bend = found
        cosine: Tensor = (off * bend).sum() / (off.norm() * bend.norm()).clamp_min(1e-20)
        return cosine

    def computed(self, step: Step, seen: Evidence) -> None:
        return None

    def learned(self, step: Step, piece: Piece, residual: Tensor) -> None:
        return None

    def tensors(self) -> list[Tensor]:
        return self.path.streams


class UnstableTokens(Tokens):
    """The least stable tokens by SADA's criterion of each: those with the largest (x - x^) . D2 y.

    SADA (arXiv 2507.17135), token-wise mode: tokens whose product is not negative are computed, up to a cap, the others
    merged away. share: of the tokens that are chosen, a number known beforehand, so that shapes need no
    synchronisation. when: "unstable" runs them at skipped steps whose own signal is not negative and none at stable ones, which
    is the paper's order (the signal must be `path_stability`); "skipped" at every skipped step. Differs: tokens are
    chosen at the last computed step, and what they lacked of the others there is added.
    """

    kind: ClassVar[str] = "unstable"
    share: float = Field(0.5, ge=0, le=1)
    when: Literal["unstable", "skipped"] = "skipped"

    def count(self, step: Step, num: int) -> int:
        return min(num, math.ceil(self.share * num))

    def runs(self, step: Step, change: float | None) -> bool:
        return self.when == "skipped" or change is None or not change < 0

    def start(self) -> TokenState:
        return _Unstable()


class _Unstable:
    def __init__(self) -> None:
        self.path = StreamPath()

    def see(self, step: Step, stream: Tensor, *, computed: bool) -> None:
        self.path.see(step.time, stream)

    def pick(self, count: int) -> Tensor:
        found = self.path.deviation_and_bend()
        if found is None:
            return evenly(count, self.path.streams[-1])
        return most(torch.mul(*found).sum(dim=(0, 2)), count)

    def tensors(self) -> list[Tensor]:
        return self.path.streams
