"""Spans: which blocks may be left out at a step.

Blocks are counted from 0 through all block lists of a network, in the order in which they run. A span may change
during the run; every contiguous part of it within one list is a `Piece` and has a history of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field, model_validator

from hasten.part import Part
from hasten.step import Step

Range = tuple[int, int]
"""Half-open range of blocks."""


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """Neighbouring blocks [start, stop) of block list number `site`, counted within that list."""

    site: int
    start: int
    stop: int


class Span(Part):
    """Family of spans."""

    @property
    def remark(self) -> str:
        """What a user should know about where these blocks come from; empty when there is nothing to say."""
        return ""

    def at(self, share: float, num: int) -> tuple[Range, ...]:
        """Ranges in [0, num) that may be left out, ascending and disjoint.

        share: how much of the run has passed, 0 at its first step and 1 at its last. num: blocks of the network.
        """
        raise NotImplementedError(f"{type(self).__name__} has no at().")


class AllBlocks(Span):
    """Every block, at every step."""

    kind: ClassVar[str] = "all"

    def at(self, share: float, num: int) -> tuple[Range, ...]:
        return ((0, num),) if num else ()


class BlockShare(Span):
    """One range of blocks, given as shares of their number, so that it fits networks of any depth."""

    kind: ClassVar[str] = "share"
    start: float = Field(0.25, ge=0, le=1)
    stop: float = Field(0.75, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> BlockShare:
        if self.stop <= self.start:
            raise ValueError(f"stop must be above start = {self.start}, got {self.stop}")
        return self

    @property
    def remark(self) -> str:
        return (
            f"blocks {100 * self.start:.0f} % to {100 * self.stop:.0f} % of the network were not chosen by a profile;"
            " `hasten profile` measures which blocks of this model move least"
        )

    def at(self, share: float, num: int) -> tuple[Range, ...]:
        start, stop = round(self.start * num), round(self.stop * num)
        return ((start, stop),) if start < stop else ()


class Chosen(Span):
    """Exactly these blocks (ProfilingDiT: the ones a profile found to move least). Neighbours are left out together."""

    kind: ClassVar[str] = "chosen"
    blocks: tuple[int, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> Chosen:
        if min(self.blocks) < 0 or list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks must be ascending numbers from 0, each once, got {list(self.blocks)}")
        return self

    def at(self, share: float, num: int) -> tuple[Range, ...]:
        return runs(index for index in self.blocks if index < num)


class RearThenFront(Span):
    """The rear blocks early in the run, the front blocks late (Delta-DiT, arXiv 2406.01125).

    The paper finds that front blocks make the outline, which early steps settle, and rear blocks the details. share:
    part of all blocks that is left out (the paper's N_c of N). switch: where in the run it changes sides (b of T).
    """

    kind: ClassVar[str] = "rear_then_front"
    share: float = Field(0.75, gt=0, le=1)
    switch: float = Field(0.5, ge=0, le=1)

    def at(self, share: float, num: int) -> tuple[Range, ...]:
        cached = round(self.share * num)
        if cached == 0:
            return ()
        return ((num - cached, num),) if share < self.switch else ((0, cached),)


def runs(indices: Iterable[int]) -> tuple[Range, ...]:
    """Ascending indices as ranges of neighbours."""
    found: list[list[int]] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1][1] = index + 1
        else:
            found.append([index, index + 1])
    return tuple((start, stop) for start, stop in found)


def cut(
    ranges: Iterable[Range], sizes: tuple[int, ...], lead: int, back: int, *, turns: bool = False
) -> tuple[Piece, ...]:
    """Ranges over the whole network as pieces of its lists, without the first `lead` and last `back` blocks.

    turns: the lists take turns, so that the first `lead` blocks of each of them come before the decision.
    """
    pieces: list[Piece] = []
    total = sum(sizes)
    for start, stop in ranges:
        start, stop = max(start, lead), min(stop, total - back)
        offset = 0
        for site, num in enumerate(sizes):
            low, high = max(start, offset + lead * turns), min(stop, offset + num)
            if low < high:
                pieces.append(Piece(site, low - offset, high - offset))
            offset += num
    return tuple(pieces)


class Itinerary:
    """The pieces of a whole run: which may be left out at each step, and which have to be learned for later ones."""

    def __init__(
        self, span: Span, sizes: tuple[int, ...], total: int, lead: int = 0, back: int = 0, *, turns: bool = False
    ) -> None:
        shares = [index / max(1, total - 1) for index in range(max(1, total))]
        self.stages = [cut(span.at(share, sum(sizes)), sizes, lead, back, turns=turns) for share in shares]
        self._later: list[tuple[Piece, ...]] = []
        known: dict[Piece, None] = {}
        for pieces in reversed(self.stages):
            known.update(dict.fromkeys(pieces))
            self._later.append(tuple(sorted(known)))
        self._later.reverse()

    def at(self, step: Step) -> tuple[Piece, ...]:
        """What may be left out at `step`."""
        return self.stages[min(step.index, len(self.stages) - 1)]

    def later(self, step: Step) -> tuple[Piece, ...]:
        """What may be left out at `step` or at any later one, so what is learned when it is computed."""
        return self._later[min(step.index, len(self._later) - 1)]

    def distinct(self) -> list[tuple[Piece, ...]]:
        """Every set of pieces that is ever left out together, in order of appearance."""
        return [pieces for pieces in dict.fromkeys(self.stages) if pieces]
