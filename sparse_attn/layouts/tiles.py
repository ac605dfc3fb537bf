"""Tiles: blocks that are boxes of frames x height x width, so that neighbours in space and time share a block."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.layouts.layout import Arrangement, Grid, Layout, LayoutState, StaticState, grid_of
from hasten.sparse_attn.segments import Segment

Side = Annotated[int, Field(ge=1)]


class Tiles(Layout):
    """Boxes of tokens (sliding tile attention, arXiv 2502.04507: 6x8x8; video sparse attention, 2505.13389: 4x4x4).

    tile: frames, height and width of a box; "best": the box of at most `block` tokens that fits the grid best, see
    `best_tile`. group: how many boxes along each axis make one block of queries.

    Unlike in both papers any grid will do: boxes at its far borders are cut short and become smaller blocks; nothing is
    padded. Raises `RefusedError` for segments without a grid.
    """

    kind: ClassVar[str] = "tiles"
    tile: tuple[Side, Side, Side] | Literal["best"] = "best"
    block: int = Field(64, ge=1, le=1024)
    group: tuple[Side, Side, Side] = (1, 1, 1)

    def shape(self, grid: Grid, side: str) -> Grid:
        """The box of one block of "q" or "k" on a grid."""
        t, h, w = best_tile(grid, self.block) if self.tile == "best" else self.tile
        return (t * self.group[0], h * self.group[1], w * self.group[2]) if side == "q" else (t, h, w)

    def start(self) -> LayoutState:
        return _Tiles(self)


class _Tiles(StaticState):
    def __init__(self, part: Tiles) -> None:
        super().__init__()
        self.part = part

    def order(self, segment: Segment, side: str) -> Arrangement:
        grid = grid_of(segment, Tiles.kind)
        return Arrangement(*tiled(grid, self.part.shape(grid, side)))


def fill(grid: Grid, tile: Grid, block: int) -> float:
    """Share of the places in blocks of `block` tokens that hold a token when each tile takes one block.

    A tile with more than `block` tokens takes as many blocks as it needs.
    """
    tiles = prod(ceil(side / step) for side, step in zip(grid, tile, strict=True))
    return prod(grid) / (tiles * ceil(prod(tile) / block) * block)


@lru_cache(maxsize=64)
def best_tile(grid: Grid, block: int = 64) -> Grid:
    """The tile of at most `block` tokens with the highest `fill` times compactness.

    Compactness is the harmonic over the geometric mean of the tile's sides, 1 for a cube: the surface of a cube of as many
    tokens over the tile's own. Axes along which the grid has one token do not count. The lexically first of equals wins.
    """
    axes = [axis for axis in range(3) if grid[axis] > 1]
    best, found = 0.0, (1, 1, 1)
    for t, h in product(range(1, min(grid[0], block) + 1), range(1, min(grid[1], block) + 1)):
        for w in range(1, min(grid[2], block // (t * h)) + 1):
            sides = [(t, h, w)[axis] for axis in axes] or [1]
            harmonic = len(sides) / sum(1 / side for side in sides)
            score = fill(grid, (t, h, w), block) * harmonic / prod(sides) ** (1 / len(sides))
            if score > best + 1e-9:
                best, found = score, (t, h, w)
    return found


@lru_cache(maxsize=16)
def tiled(grid: Grid, tile: Grid) -> tuple[Tensor, Tensor]:
    """Tokens tile by tile, each tile row by row: perm int64 [1, n] and bounds int32 [1, C + 1], on the CPU, read only."""
    counts = [ceil(side / step) for side, step in zip(grid, tile, strict=True)]
    number = torch.zeros(1, 1, 1, dtype=torch.int64)
    sizes = torch.ones(1, 1, 1, dtype=torch.int64)
    for axis in range(3):
        shape = [-1 if other == axis else 1 for other in range(3)]
        along = torch.arange(grid[axis]) // tile[axis]
        number = number * counts[axis] + along.view(shape)
        sizes = sizes * along.bincount().view(shape)
    perm = number.flatten().argsort(stable=True)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.flatten().cumsum(0)])
    return perm[None], bounds[None].int()
