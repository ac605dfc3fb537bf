"""Static scorers on a grid: neighbourhoods, sliding tiles, groups around, groups in line.

Shapes: see `hasten.sparse_attn.blocks` and `hasten.sparse_attn.scorers.static`.
"""

from __future__ import annotations

import torch
from pydantic import model_validator
from torch import Tensor

from hasten.errors import RecipeError, UsageError
from hasten.sparse_attn.scorers.static import Scene, Span, Static, gap, tiles

Lengths = tuple[int, ...]
"""One number per axis: (tokens,), (rows, columns) or (frames, rows, columns)."""


class Neighbourhood(Static):
    """Each query reads a window of `window` keys around it, along each axis (NATTEN's semantics, 1 to 3 axes).

    Hassani et al., neighbourhood attention (2023), dilated (2022) and generalised (2025). Windows are moved inwards at
    borders, so that every query reads as many keys. stride: so many neighbouring queries share the window of the one in
    their middle. dilation: every d-th key only. causal: along that axis the window ends at the query.

    window: 3 numbers: (frames, rows, columns); 2: (rows, columns) of all frames; 1: tokens of the segment in order.
    Windows longer than an axis are the whole axis, where NATTEN refuses. stride, dilation, causal: as many, or none.

    Without dilation, exactly the pairs of blocks that hold a pair of NATTEN's are read: all of their tokens, however,
    so it is NATTEN's attention token by token where blocks are tiles that divide window and stride, and reads up to a
    block more elsewhere. With dilation, a few pairs at the edge of windows may be read that hold none.
    """

    kind = "neighbourhood"
    window: Lengths
    stride: Lengths | None = None
    dilation: Lengths | None = None
    causal: tuple[bool, ...] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Neighbourhood:
        if len(self.window) not in (1, 2, 3) or min(self.window) < 1:
            raise RecipeError(f"neighbourhood: window {self.window} has to be 1 to 3 numbers of 1 or more.")
        for name in ("stride", "dilation", "causal"):
            given = getattr(self, name)
            if given is None:
                continue
            if len(given) != len(self.window) or (name != "causal" and min(given) < 1):
                raise RecipeError(f"neighbourhood: {name} {given} has to be {len(self.window)} numbers, as the window.")
        for window, stride in zip(self.window, self.stride or (), strict=False):
            if stride > window:
                raise RecipeError(f"neighbourhood: a stride of {stride} leaves gaps between windows of {window}.")
        return self

    def reads(self, scene: Scene) -> Tensor:
        count = len(self.window)
        if count == 1:
            lengths: tuple[int, ...] = (scene.q_segment.length,)
            if scene.k_segment.length != lengths[0]:
                raise UsageError(
                    f"The scorer neighbourhood has as many keys as queries; got {lengths[0]} queries and"
                    f" {scene.k_segment.length} keys. Use a-shape for a cache of keys."
                )
            axes: list[tuple[Span, Span]] = [(scene.q.token, scene.k.token)]
        else:
            lengths = scene.grid(self.kind)[-count:]
            axes = list(zip(scene.q.axes, scene.k.axes, strict=True))[-count:]
        found = torch.ones((), dtype=torch.bool, device=axes[0][0][0].device)
        for number, ((q, k), length) in enumerate(zip(axes, lengths, strict=True)):
            stride = self.stride[number] if self.stride else 1
            dilation = self.dilation[number] if self.dilation else 1
            causal = self.causal[number] if self.causal else False
            found = found & in_window(q, k, length, self.window[number], stride, dilation, causal=causal)
        return found


def in_window(
    q: Span, k: Span, length: int, window: int, stride: int = 1, dilation: int = 1, *, causal: bool = False
) -> Tensor:
    """Does the window of any query of a range hold any key of another? One axis of `length` tokens."""
    first, last = windows(length, window, stride, dilation, causal=causal, device=q[0].device)
    # Windows move on with their query, but for steps back of less than a dilation: so the widest of the range is taken.
    first = first.flip(0).cummin(0).values.flip(0)
    last = last.cummax(0).values
    reach = (first[q[0].clamp(0, length - 1).long()], last[q[1].clamp(0, length - 1).long()])
    found = (k[1] >= reach[0]) & (k[0] <= reach[1])
    if dilation == 1:
        return found
    low, high = k[0] - q[1], k[1] - q[0]
    return found & (torch.div(high, dilation, rounding_mode="floor") * dilation >= low)


def windows(
    length: int, window: int, stride: int, dilation: int, *, causal: bool, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """First and last key of each query's window along an axis of `length` tokens: int64 [length] each."""
    at = torch.arange(length, device=device)
    own, group = at // dilation, at % dilation
    members = (length - group + dilation - 1) // dilation
    size = members.clamp(max=window)
    middle = stride - 1 if causal else stride // 2
    leader = (own // stride * stride + middle).minimum(members - 1)
    if causal:
        first, last = (leader - size + 1).clamp(min=0), own
    else:
        first = (leader - size // 2).clamp(min=0).minimum(members - size)
        last = first + size - 1
    return first * dilation + group, last * dilation + group


class SlidingTile(Static):
    """Each tile of queries reads the `window` tiles around its own, moved inwards at borders (STA, Zhang et al. 2025).

    tile: (frames, rows, columns) of a tile, window: (frames, rows, columns) in tiles; (6, 8, 8) and (3, 3, 3) at
    Hunyuan's 30 x 48 x 80. Exact where the layout's blocks lie within tiles (the layout tiles with the same tile).
    The official kernel knows three sizes of video; any grid will do here, its last tiles may be cut.
    """

    kind = "sliding-tile"
    tile: tuple[int, int, int] = (6, 8, 8)
    window: tuple[int, int, int] = (3, 3, 3)

    def reads(self, scene: Scene) -> Tensor:
        grid = scene.grid(self.kind)
        found = torch.ones((), dtype=torch.bool, device=scene.q.frame[0].device)
        for q, k, length, size, window in zip(scene.q.axes, scene.k.axes, grid, self.tile, self.window, strict=True):
            found = found & in_window(tiles(q, size), tiles(k, size), -(-length // size), window)
        return found


class Around(Static):
    """Each group of queries reads the groups at most `radius` away along every axis (GRAT-B).

    Ren et al. 2025, grouped attention. group: (frames, rows, columns). Unlike sliding tiles, groups at a border read
    fewer. The paper asks for grids that groups divide; the last groups may be cut here.
    """

    kind = "around"
    group: tuple[int, int, int] = (4, 8, 8)
    radius: tuple[int, int, int] = (1, 1, 1)

    def reads(self, scene: Scene) -> Tensor:
        scene.grid(self.kind)
        found = torch.ones((), dtype=torch.bool, device=scene.q.frame[0].device)
        for q, k, size, radius in zip(scene.q.axes, scene.k.axes, self.group, self.radius, strict=True):
            found = found & (gap(tiles(q, size), tiles(k, size)) <= radius)
        return found


class CrissCross(Static):
    """Each group of queries reads the groups that have its frame, its row or its column of groups (GRAT-X).

    Ren et al. 2025. group: as in `Around`. On one frame that is a cross; axes with a single group are left out, as
    everything would share it.
    """

    kind = "criss-cross"
    group: tuple[int, int, int] = (4, 8, 8)

    def reads(self, scene: Scene) -> Tensor:
        grid = scene.grid(self.kind)
        found = torch.zeros((), dtype=torch.bool, device=scene.q.frame[0].device)
        for q, k, length, size in zip(scene.q.axes, scene.k.axes, grid, self.group, strict=True):
            if length > size:
                found = found | (gap(tiles(q, size), tiles(k, size)) == 0)
        if all(length <= size for length, size in zip(grid, self.group, strict=True)):
            return ~found
        return found
