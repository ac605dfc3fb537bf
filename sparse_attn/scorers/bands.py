"""Static scorers along one line: bands, sinks and windows, radial decay, equal blocks.

Shapes: see `hasten.sparse_attn.blocks` and `hasten.sparse_attn.scorers.static`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.blocks import SELECT, SPARSE
from hasten.sparse_attn.scorers.static import Scene, Static, gap


class Bands(Static):
    """Each query reads the keys within a band, and all of the first frame (Sparse VideoGen, section 3.2).

    along: "space", where tokens are counted frame by frame, so that the band holds the query's frame and those beside
    it; "time", where they are counted pixel by pixel through all frames (use the layout swap, whose blocks are then
    runs in time). share: of all pairs that lie within the band; of N tokens it reaches N (1 - sqrt(1 - share)) to both
    sides. The official code rounds the reach to 128 tokens and corrects the share for text, which always is read here.
    """

    kind = "bands"
    along: Literal["space", "time"] = "space"
    share: float = Field(default=0.25, gt=0, le=1)
    sink: bool = True

    def reads(self, scene: Scene) -> Tensor:
        scene.grid(self.kind)
        reach = round(scene.q_segment.length * (1 - math.sqrt(1 - self.share)))
        if self.along == "space":
            found = gap(scene.q.token, scene.k.token) <= reach
        else:
            found = gap(scene.q.later, scene.k.later) <= reach
        return found | (scene.k.frame[0] == 0) if self.sink else found


class Radial(Static):
    """The further apart two frames are, the narrower the band of cells they share (Li et al. 2025, Radial Attention).

    Frames at distance 0 or 1 see each other whole. At distance d, with g = bits of d and 2^b the power of two above
    the tokens of a frame, the band reaches 2^(b-g) decay cells, at least `least`; where 2^(b-g) itself is less,
    only distances that are multiples of least / 2^(b-g) are kept at all. sink: the first frame is read by all (Wan).

    decay: 0.2 for Wan and 0.95 for HunyuanVideo in the paper's code. least: 128 tokens there, its block. That code
    makes the rule a map of 128-token blocks by density (a block of which little is read is dropped), ours reads every
    block that the rule touches: more.
    """

    kind = "radial"
    decay: float = Field(default=0.2, gt=0, le=1)
    least: int = Field(default=128, ge=1)
    sink: bool = True

    def reads(self, scene: Scene) -> Tensor:
        frames, height, width = scene.grid(self.kind)
        q, k = scene.q.frame, scene.k.frame
        nearest = gap(q, k)
        farthest = torch.maximum(q[1] - k[0], k[1] - q[0])
        reach = torch.tensor(self._widest(frames, height * width), device=q[0].device)
        widest = reach[nearest.clamp(0, frames - 1).long(), farthest.clamp(0, frames - 1).long()]
        found = gap(scene.q.cell, scene.k.cell) < widest
        return found | (k[0] == 0) if self.sink else found

    def reach(self, distance: int, cells: int) -> int:
        """Cells that the band between frames at `distance` reaches to each side, 0 for none. cells: of a frame."""
        if distance <= 1:
            return cells
        undecayed = 2.0 ** (cells.bit_length() - distance.bit_length())
        if undecayed < self.least and distance % max(1, round(self.least / undecayed)):
            return 0
        return math.ceil(max(undecayed * self.decay, self.least))

    def _widest(self, frames: int, cells: int) -> list[list[int]]:
        """Widest band of the distances from one number to another, both included."""
        reach = [self.reach(distance, cells) for distance in range(frames)]
        return [[max(reach[low : high + 1], default=0) for high in range(frames)] for low in range(frames)]


class AShape(Static):
    """The first keys and a window of the last ones (StreamingLLM; the A-shape of MInference): tokens, by position.

    sink: first keys of the sequence. window: keys at a distance below it, to both sides unless a mask forbids one.
    """

    kind = "a-shape"
    sink: int = Field(default=64, ge=0)
    window: int = Field(default=1024, ge=1)

    def reads(self, scene: Scene) -> Tensor:
        return (gap(scene.q.place, scene.k.place) < self.window) | (scene.k.place[0] < self.sink)


class BlockDiagonal(Static):
    """Block i of the queries reads block i of the keys, and those at most `reach` beside it.

    With a layout that sorts both sides alike, this is the choice: hash buckets (HyperAttention, Han et al. 2023, the
    part without samples) or common clusters (Routing Transformer, Roy et al. 2021). Only blocks that are selected
    count; with other numbers of blocks on both sides, those that stand at the same share of the sequence.
    """

    kind = "block-diagonal"
    reach: int = Field(default=0, ge=0)

    def reads(self, scene: Scene) -> Tensor:
        sparse, select = scene.blocks.q.roles == SPARSE, scene.blocks.k.roles == SELECT
        rows, columns = sparse.sum(), select.sum()
        i = (sparse.long().cumsum(0) - 1)[None, :, None]
        j = (select.long().cumsum(0) - 1)[None, None, :]
        # i / rows to (i + 1) / rows and j / columns to (j + 1) / columns overlap, by `reach` blocks of keys wider.
        ahead = (i + 1) * columns + self.reach * rows > j * rows
        behind = (j + 1 + self.reach) * rows > i * columns
        return ahead & behind
