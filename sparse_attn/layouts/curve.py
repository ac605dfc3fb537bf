"""Curve: tokens along one path that fills the grid and moves from neighbour to neighbour."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from hasten.sparse_attn.blocks import uniform
from hasten.sparse_attn.layouts.layout import Arrangement, Blocked, Grid, LayoutState, StaticState, grid_of
from hasten.sparse_attn.segments import Segment


class Curve(Blocked):
    """Tokens along a Hilbert curve for boxes of any size; every `block` of them make a block.

    Blocks are compact without being boxes, and all of them are full on every grid. Hilbert's construction wants cubes with a
    power of two along each side; here boxes are cut in (nearly) equal parts instead, as in J. Cerveny's "generalized
    Hilbert curve"; see `cuts`. Raises `RefusedError` for segments without a grid.
    """

    kind: ClassVar[str] = "curve"

    def start(self) -> LayoutState:
        return _Curve(self)


class _Curve(StaticState):
    def __init__(self, part: Curve) -> None:
        super().__init__()
        self.part = part

    def order(self, segment: Segment, side: str) -> Arrangement:
        perm = curve(grid_of(segment, Curve.kind))
        return Arrangement(perm, uniform(segment.length, self.part.size(side)))


@lru_cache(maxsize=16)
def curve(grid: Grid) -> Tensor:
    """The tokens of a grid along the curve: int64 [1, n], on the CPU, read only.

    The curve leads along the longest axis, or an even one that is nearly as long: only then can every step be one to
    a direct neighbour (the parity of a checkerboard); on other grids few steps are diagonal.
    """
    axes = sorted(range(3), key=lambda axis: -grid[axis] * (3 if grid[axis] % 2 == 0 else 2))
    path = _path((grid[axes[0]], grid[axes[1]], grid[axes[2]]), {})
    strides = (grid[1] * grid[2], grid[2], 1)
    return sum((path[:, i] * strides[axis] for i, axis in enumerate(axes)), torch.zeros(prod(grid), dtype=torch.int64))[None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a box, itself crossed by a path. sides: along the path's own three axes. axes: which axis of the whole
    each of them runs along; signs: in which direction; start: where in the whole the path begins."""

    sides: Grid
    axes: Grid
    signs: Grid
    start: Grid


def _path(sides: Grid, made: dict[Grid, Tensor]) -> Tensor:
    """Places [n, 3] of a path through a box, from one corner to the next one along its first axis.

    made: paths of boxes that came up before; only few different ones do.
    """
    if sides not in made:
        if sides[1:] == (1, 1):
            made[sides] = torch.zeros(sides[0], 3, dtype=torch.int64)
            made[sides][:, 0] = torch.arange(sides[0])
        else:
            made[sides] = torch.cat([_laid(piece, made) for piece in cuts(*sides)])
    return made[sides]


def _laid(piece: Piece, made: dict[Grid, Tensor]) -> Tensor:
    own = _path(piece.sides, made)
    places = torch.empty_like(own)
    for axis, sign, values in zip(piece.axes, piece.signs, own.unbind(1), strict=True):
        places[:, axis] = piece.start[axis] + sign * values
    return places


def cuts(a: int, b: int, c: int) -> list[Piece]:
    """The parts of a box of a x b x c in the order of a path from (0, 0, 0) to (a - 1, 0, 0).

    Each part begins beside the end of the one before. Long boxes are cut in two along a; flat ones fold once (up,
    across, down); others twice, which is Hilbert's curve with the octants that follow each other along an axis joined.
    """
    if a == 1:  # ends at another corner than asked for: in a plane of one row there is no other way
        return [Piece((b, c, 1), (1, 2, 0), (1, 1, 1), (0, 0, 0)) if b >= c else Piece((c, b, 1), (2, 1, 0), (1, 1, 1), (0, 0, 0))]
    if b == 1:
        return [Piece((a, c, 1), (0, 2, 1), (1, 1, 1), (0, 0, 0))]
    a1, b1, c1 = _half(a), _half(b), _half(c)
    if 2 * a > 3 * max(b, c):
        return [Piece((a1, b, c), (0, 1, 2), (1, 1, 1), (0, 0, 0)), Piece((a - a1, b, c), (0, 1, 2), (1, 1, 1), (a1, 0, 0))]
    if c == 1 or 3 * b > 4 * c:
        return [
            Piece((b1, a1, c), (1, 0, 2), (1, 1, 1), (0, 0, 0)),
            Piece((a, b - b1, c), (0, 1, 2), (1, 1, 1), (0, b1, 0)),
            Piece((b1, a - a1, c), (1, 0, 2), (-1, -1, 1), (a - 1, b1 - 1, 0)),
        ]
    if 3 * c > 4 * b:
        return [
            Piece((c1, a1, b), (2, 0, 1), (1, 1, 1), (0, 0, 0)),
            Piece((a, c - c1, b), (0, 2, 1), (1, 1, 1), (0, 0, c1)),
            Piece((c1, a - a1, b), (2, 0, 1), (-1, -1, 1), (a - 1, 0, c1 - 1)),
        ]
    return [
        Piece((b1, c1, a1), (1, 2, 0), (1, 1, 1), (0, 0, 0)),
        Piece((c, a1, b - b1), (2, 0, 1), (1, 1, 1), (0, b1, 0)),
        Piece((a, b1, c - c1), (0, 1, 2), (1, -1, -1), (0, b1 - 1, c - 1)),
        Piece((c, a - a1, b - b1), (2, 0, 1), (-1, -1, 1), (a - 1, b1, c - 1)),
        Piece((b1, c1, a - a1), (1, 2, 0), (-1, 1, -1), (a - 1, b1 - 1, 0)),
    ]


def _half(side: int) -> int:
    """Half of a side, even where there is a choice: paths along even sides need no diagonal step."""
    half = side // 2
    return half + 1 if half % 2 and side > 2 else half
