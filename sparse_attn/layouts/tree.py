"""Tree: tokens halved again and again along the direction in which they differ most, into exactly equal blocks."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from hasten.sparse_attn.blocks import uniform
from hasten.sparse_attn.layouts.layout import Arrangement, Blocked, LayoutState
from hasten.sparse_attn.segments import Segment

ROOM = 1 << 27
"""Floats that the planes handled at once may have on a GPU; temporaries take a few times as much."""

SAMPLE = 512
"""Tokens of a node that its direction is found from, about; evenly spread over the order so far, which is along its
parent's. With 256 blocks become measurably less homogeneous, with more they do not gain."""

LARGE = 3e38


class Tree(Blocked):
    """Blocks of similar tokens that all have exactly `block` of them (but for the last): no tile is half empty.

    A node is sorted along its leading principal direction and cut in two, until one block is left (a PCA tree: Sproull,
    Algorithmica 6, 1991; that its equal leaves make good attention blocks is our own finding). k-means has tighter
    clusters, of any size, at a fixed number of passes more. The order of the blocks is that of the tree's leaves.

    iterations: steps of the power method that finds the direction.
    """

    kind: ClassVar[str] = "tree"
    q_block: int | None = Field(128, ge=1)
    iterations: int = Field(4, ge=1, le=64)

    def start(self) -> LayoutState:
        return _Tree(self)


class _Tree(LayoutState):
    def __init__(self, part: Tree) -> None:
        self.part = part

    def arrange(self, x: Tensor, segment: Segment, side: str) -> Arrangement:
        b, h, n, d = x.shape
        block = self.part.size(side)
        return Arrangement(balanced(x.reshape(b * h, n, d), block, self.part.iterations), uniform(n, block, x.device))


def balanced(x: Tensor, block: int, iterations: int = 4) -> Tensor:
    """The tokens of x [P, n, D] in the order of the leaves, of `block` tokens each: int64 [P, n].

    All shapes follow from n and `block`; nothing is read from the device.
    """
    return torch.cat([_grown(part, block, iterations) for part in portions(x)])


def portions(x: Tensor) -> list[Tensor]:
    """x [P, n, D] in portions of planes to be handled at once: on a CPU one, which stays in its cache."""
    planes, n, d = x.shape
    at_once = 1 if x.device.type == "cpu" else max(1, ROOM // max(1, n * d))
    return [x[first : first + at_once] for first in range(0, planes, at_once)]


def _grown(x: Tensor, block: int, iterations: int) -> Tensor:
    """`balanced` for planes handled together."""
    planes, n, _ = x.shape
    perm = torch.arange(n, device=x.device).expand(planes, n)
    widest = -(-n // block)  # leaves of the widest node, the first of its level
    leaves = torch.full((1,), widest, device=x.device)
    while widest > 1:
        ends = leaves.cumsum(0).mul_(block).clamp_(max=n)
        perm = _sorted(x, perm, ends, min(n, widest * block), iterations)
        leaves = torch.stack([(leaves + 1) // 2, leaves // 2], 1).flatten()  # empty nodes only where no other level follows
        widest = (widest + 1) // 2
    return perm


def _sorted(x: Tensor, perm: Tensor, ends: Tensor, width: int, iterations: int) -> Tensor:
    """`perm` with each node sorted along its direction. ends: int64 [N], places behind each node; width: of the widest."""
    planes, n, d = x.shape
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    column = torch.arange(width, device=x.device)
    absent = column >= (ends - starts)[:, None]  # room of narrower nodes: holds their last token, and counts for nothing
    place = torch.minimum(starts[:, None] + column, ends[:, None] - 1)
    tokens = perm[:, place.flatten()]
    rows = tokens + torch.arange(planes, device=x.device)[:, None] * n
    points = x.reshape(-1, d).index_select(0, rows.flatten()).float().view(planes, *absent.shape, d)
    present = (~absent).float()[..., None]  # multiplying and adding up is several times faster than filling and `bmm`
    mean = points.mul_(present).sum(2, keepdim=True) / (ends - starts)[:, None, None]
    points = points.sub_(mean).mul_(present)
    some = points[:, :, :: max(1, width // SAMPLE)]
    along = (points * direction(some.mT @ some, iterations)[..., None, :]).sum(-1)
    along = along.nan_to_num_(0.0, LARGE, -LARGE).masked_fill_(absent, torch.inf)  # what is not there goes last
    order = along.sort(stable=True, dim=-1).indices
    tokens = tokens.view(planes, *absent.shape).gather(2, order).flatten(1)
    node = torch.searchsorted(ends, torch.arange(n, device=x.device), right=True)
    return tokens[:, node * width + torch.arange(n, device=x.device) - starts[node]]


def direction(spread: Tensor, iterations: int) -> Tensor:
    """Leading eigenvectors [..., D] of symmetric matrices [..., D, D], by the power method.

    Begins at the column of the largest variance, so equal matrices give equal vectors, sign included.
    """
    largest = spread.diagonal(dim1=-2, dim2=-1).argmax(-1)
    index = largest[..., None, None].expand(*largest.shape, 1, spread.shape[-1])
    found = normalize(spread.gather(-2, index)[..., 0, :], dim=-1)
    for _ in range(iterations):
        found = normalize((spread * found[..., None, :]).sum(-1), dim=-1)
    return found
