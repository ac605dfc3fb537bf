"""A span that was found by a search: other blocks at every step, each on its own."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from hasten.caching.spans import Range, Span


class Timetable(Span):
    """Which blocks may be left out at which step of the run (AutoDiffusion, arXiv 2309.10438, searches them).

    out: a row per step, of block numbers, ascending; with another number of steps the rows are spread over the run. An empty
    row is a step at which all blocks run. Neighbours are left out one by one, so that what one block adds is learned once
    for all steps.
    """

    kind: ClassVar[str] = "timetable"
    out: tuple[tuple[int, ...], ...] = ((1,),)

    @model_validator(mode="after")
    def _ascending(self) -> Timetable:
        bad = next((row for row in self.out if list(row) != sorted(set(row)) or (row and row[0] < 0)), None)
        if bad is not None or not any(self.out):
            raise ValueError(f"out must have rows of ascending numbers from 0, at least one not empty, got {list(bad or ())}")
        return self

    def at(self, share: float, num: int) -> tuple[Range, ...]:
        row = self.out[round(share * (len(self.out) - 1))]
        return tuple((block, block + 1) for block in row if block < num)
