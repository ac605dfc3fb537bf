"""Tokens in tight clusters, and how well an order of tokens keeps alike ones together."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.sparse_attn.blocks import Order
from hasten.sparse_attn.layouts.layout import Layout
from hasten.sparse_attn.segments import Tokens
from tests.contract import seeded

WAN_720 = (21, 45, 80)


def order(part: Layout, x: Tensor, tokens: Tokens) -> Order:
    return part.start().blocks(x, x, tokens, tokens).k


def spread(x: Tensor, found: Order) -> Tensor:
    """Sum of squared distances of tokens to their block's mean, of each plane."""
    y = found.arrange(x).flatten(0, 1)
    means = found.mean(found.arrange(x))
    labels = found.labels().expand(y.shape[0], -1)
    return (y - means.gather(1, labels[..., None].expand_as(y))).square().sum((1, 2))


def clustered(planes: int, clusters: int, size: int, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tight clusters in random order: x [1, planes, clusters * size, d] and the cluster of each token [n]."""
    owner = torch.arange(clusters).repeat(size)[torch.randperm(clusters * size, generator=torch.Generator().manual_seed(seed))]
    centres = 4 * seeded(seed, planes, clusters, d)
    return (centres[:, owner] + 0.1 * seeded(seed + 1, planes, clusters * size, d))[None], owner
