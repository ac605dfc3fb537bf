"""Swap: the axes of the grid in another order, for heads that look along time."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, prod
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor

from hasten.errors import RecipeError
from hasten.sparse_attn.blocks import uniform
from hasten.sparse_attn.layouts.layout import Arrangement, Blocked, Grid, LayoutState, StaticState, grid_of
from hasten.sparse_attn.segments import Segment


class Swap(Blocked):
    """Tokens with the axes of the grid in the order `axes`, slowest first.

    (1, 2, 0) puts all frames of one place side by side: the order of the temporal heads of Sparse VideoGen (arXiv
    2502.01776, section 4.2), where a band of keys is then the same places in all frames. (2, 0, 1) and the like do the
    same for columns. (0, 1, 2) is the order that tokens have.

    aligned: blocks end where a row ends (a row: the tokens along the fastest axis). As many whole rows as `block` has
    room for make a block; a row that is longer than that is cut into equal pieces. The paper's blocks are not aligned.
    Raises `RefusedError` for segments without a grid.
    """

    kind: ClassVar[str] = "swap"
    axes: tuple[int, int, int] = (1, 2, 0)
    aligned: bool = True

    @model_validator(mode="after")
    def _permutes(self) -> Swap:
        if sorted(self.axes) != [0, 1, 2]:
            raise RecipeError(f"swap.axes = {self.axes}: each of 0 (frames), 1 (height) and 2 (width) has to be there once.")
        return self

    def start(self) -> LayoutState:
        return _Swap(self)


class _Swap(StaticState):
    def __init__(self, part: Swap) -> None:
        super().__init__()
        self.part = part

    def order(self, segment: Segment, side: str) -> Arrangement:
        grid, block = grid_of(segment, Swap.kind), self.part.size(side)
        row = grid[self.part.axes[-1]]
        bounds = rows(segment.length, row, block) if self.part.aligned else uniform(segment.length, block)
        return Arrangement(swapped(grid, self.part.axes), bounds)


@lru_cache(maxsize=16)
def swapped(grid: Grid, axes: Grid) -> Tensor:
    """The tokens of a grid with its axes in the order `axes`: int64 [1, n], on the CPU, read only."""
    return torch.arange(prod(grid)).view(grid).permute(axes).reshape(1, -1)


def rows(length: int, row: int, block: int) -> Tensor:
    """Bounds of blocks of at most `block` tokens that end with a row of `row` tokens or cut it evenly: int32 [1, C + 1]."""
    if row <= block:
        return uniform(length, block // row * row)
    pieces = ceil(row / block)
    cuts = torch.arange(pieces) * row // pieces
    starts = (torch.arange(0, length, row)[:, None] + cuts).flatten()
    return torch.cat([starts, starts.new_tensor([length])])[None].int()
