"""Sums over the tokens of blocks, of what is there for every pair or row.

Shapes: see `hasten.sparse_attn.blocks`; M rows, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def key_sums(shares: Tensor, labels: Tensor, count: int) -> Tensor:
    """Sums of `shares` [P, M, N] over the columns of each of `count` blocks: [P, M, C]. labels: int64 [P1, N].

    As a product with the matrix of membership: a sum in a fixed order, which scattered additions on a GPU are not, and
    without the lost digits of differences of running sums.
    """
    member = (labels[:, :, None] == torch.arange(count, device=labels.device)).to(shares.dtype)
    return torch.matmul(shares, member)


def add_rows(sums: Tensor, labels: Tensor, rows: Tensor) -> None:
    """sums[p, labels[p, m]] += rows[p, m] for sums [P, C, N], labels int64 [P1, M] and rows [P, M, N]."""
    planes, count, width = sums.shape
    flat = labels.expand(planes, -1) + torch.arange(planes, device=labels.device)[:, None] * count
    sums.view(planes * count, width).index_add_(0, flat.reshape(-1), rows.reshape(-1, width))
