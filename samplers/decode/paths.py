"""Which node of a token tree stands above which. Shapes: B rows, N nodes. Never waits for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ancestors(parent: Tensor) -> Tensor:
    """bool [B, N, N]: is node j node i itself, or above it? parent int64 [B, N], -1 for none."""
    nodes = parent.shape[1]
    index = torch.arange(nodes, device=parent.device)
    reach = ((parent[..., None] == index) | (index[:, None] == index)).float()
    for _ in range(max(1, math.ceil(math.log2(max(2, nodes))))):
        reach = reach @ reach
        if nodes > 64:  # of so many, ways from node to node may be more than a float can count
            reach = reach.clamp(max=1)
    return reach > 0


def path_to(node: Tensor, above: Tensor, depth: Tensor) -> Tensor:
    """Nodes from node 0 to `node` int64 [B], int64 [B, N], -1 behind it. above: `ancestors`, bool [B, N, N]; depth int64 [B, N]."""
    nodes = above.shape[1]
    line = above.gather(1, node[:, None, None].expand(-1, 1, nodes))[:, 0]
    place = depth.masked_fill(~line, nodes)
    index = torch.arange(nodes, device=node.device).expand_as(place)
    return index.new_full((len(node), nodes + 1), -1).scatter(1, place, index)[:, :nodes]
