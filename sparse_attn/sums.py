"""Sums over the tokens of blocks, in an order that is always the same: equal inputs give equal bits on every device.

Scattered additions on a GPU come in any order; their last digits would decide between blocks whose scores nearly tie, and
two runs with one seed would differ. Differences of running sums lose digits on long sequences.

Shapes: see `hasten.sparse_attn.blocks`; M rows (consecutive arranged tokens), N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

HELD = 2**26
"""Elements that are held in float32 at a time: a quarter of a GiB."""


def slices(planes: int, elements: int) -> list[slice]:
    """The planes in groups of at most `HELD` elements. elements: of one plane."""
    step = max(1, HELD // max(1, elements))
    return [slice(at, at + step) for at in range(0, planes, step)]


def of(shared: Tensor, part: slice) -> Tensor:
    """What belongs to some of the planes; all of it where the planes share it."""
    return shared if shared.shape[0] == 1 else shared[part]


def block_sums(rows: Tensor, bounds: Tensor, first: int = 0) -> Tensor:
    """Sums over the rows of each block: float32 [P, C, N] for rows [P, M, N] and bounds int32 [1 or P, C + 1].

    first: arranged place of the first row; blocks of which no row is here have 0.
    """
    parts = slices(rows.shape[0], rows.shape[1] * rows.shape[2])
    found = [_block_sums(rows[part], of(bounds, part), first) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


def _block_sums(rows: Tensor, bounds: Tensor, first: int) -> Tensor:
    (planes, count, width), blocks = rows.shape, bounds.shape[1] - 1
    flat = rows.reshape(planes * count, width).float()
    if flat.is_cuda:
        return in_segments(flat, bounds.clamp(first, first + count).diff(dim=1).expand(planes, -1))
    places = torch.arange(first, first + count, dtype=bounds.dtype, device=bounds.device)
    labels = torch.searchsorted(bounds[:, 1:-1].contiguous(), places.expand(bounds.shape[0], -1).contiguous(), right=True)
    labels = labels + torch.arange(planes, device=bounds.device)[:, None] * blocks
    return flat.new_zeros(planes * blocks, width).index_add_(0, labels.reshape(-1), flat).view(planes, blocks, width)


def in_segments(flat: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive rows: [P, C, N] for flat [P * M, N] and lengths int [P, C]. Each by one thread per column."""
    found = torch.segment_reduce(flat, "sum", lengths=lengths.reshape(-1).long(), axis=0, unsafe=True, initial=0.0)
    return found.view(*lengths.shape, flat.shape[1])


def key_sums(shares: Tensor, labels: Tensor, count: int) -> Tensor:
    """Sums of `shares` [P, M, N] over the columns of each of `count` blocks: [P, M, C]. labels: int64 [P1, N].

    As a product with the matrix of membership.
    """
    member = (labels[:, :, None] == torch.arange(count, device=labels.device)).to(shares.dtype)
    return torch.matmul(shares, member)
