"""Which tokens there are: named ranges of a sequence, and what may be left out of each.

Shapes: B batch, S tokens of the sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hasten.errors import UsageError

Queries = Literal["sparse", "dense", "none"]
"""sparse: read the selected blocks. dense: read every key that is not padding. none: padding, output is 0."""

Keys = Literal["select", "always", "never"]
"""select: read where selected. always: read by every query. never: padding."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of tokens with one role.

    length: tokens. grid: (frames, height, width) in tokens, in the order of the sequence, where these tokens are a
    video or an image; None for others. valid: real tokens of each sample, counted from the start of the range (int64,
    [B]); the rest is padding, which no query reads. None: all are real.
    """

    name: str
    length: int
    queries: Queries = "sparse"
    keys: Keys = "select"
    grid: tuple[int, int, int] | None = None
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        if self.length < 0:
            raise UsageError(f"Segment {self.name!r} has {self.length} tokens; lengths are 0 or more.")
        if self.grid is not None and math.prod(self.grid) != self.length:
            raise UsageError(
                f"Segment {self.name!r}: a grid of {self.grid} has {math.prod(self.grid)} tokens, the segment"
                f" {self.length}. Give frames, height and width in tokens, after patching."
            )


def video(frames: int, height: int, width: int, name: str = "video") -> Segment:
    """Tokens of a video (or, with one frame, of an image), row by row: the ones that sparse attention is for."""
    return Segment(name, frames * height * width, grid=(frames, height, width))


def text(length: int, name: str = "text", valid: Tensor | None = None) -> Segment:
    """Prompt tokens of joint attention: every query reads them, and they read everything. See `Segment.valid`."""
    return Segment(name, length, queries="dense", keys="always", valid=valid)


def reference(length: int, name: str = "reference") -> Segment:
    """Tokens of reference pictures or sinks: every query reads them, their own queries are sparse."""
    return Segment(name, length, queries="sparse", keys="always")


def padding(length: int, name: str = "padding") -> Segment:
    """Tokens that nobody reads and whose output is 0."""
    return Segment(name, length, queries="none", keys="never")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A whole sequence: its segments in order."""

    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """Tokens of all segments, S."""
        return sum(segment.length for segment in self.segments)

    @property
    def starts(self) -> tuple[int, ...]:
        """First token of each segment."""
        found, at = [], 0
        for segment in self.segments:
            found.append(at)
            at += segment.length
        return tuple(found)


def plain(length: int, grid: tuple[int, int, int] | None = None) -> Tokens:
    """A sequence of one kind of tokens, all sparse and selectable."""
    return Tokens((Segment("tokens", length, grid=grid),))
