"""What a plan costs: pairs of tokens, the work of whole tiles, operations and bytes.

`pairs`, `density`, `tile_density` and `flops` are tensors on the plan's device that nobody has waited for; `cost` reads
them. Elements that `Plan.mask` forbids within a ragged chunk are computed and thrown away, so they count as read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.sparse_attn.plan import Plan


def row_tokens(plan: Plan) -> Tensor:
    """Keys in the chunks of each row: int64 [R]."""
    # Room between rows may hold anything: it is in both sums, and their difference is exact even after an overflow.
    before = torch.cat([plan.chunk_length.new_zeros(1, dtype=torch.int64), plan.chunk_length.cumsum(0)])
    return before[plan.row_end.long()] - before[plan.row_start.long()]


def pairs(plan: Plan) -> Tensor:
    """Pairs of a query and a key that are computed: int64 scalar, over all planes."""
    return (plan.tile_length.long() * row_tokens(plan)[plan.tile_row.long()]).sum()


def density(plan: Plan) -> Tensor:
    """Share of all pairs of tokens that is computed: float32 scalar. 1 is dense attention."""
    return (pairs(plan).double() / _all_pairs(plan)).float()


def tile_density(plan: Plan) -> Tensor:
    """`density` as a kernel with whole tiles pays for it: every tile block_m queries, every chunk block_n keys."""
    chunks = (plan.row_end - plan.row_start).long()[plan.tile_row.long()] * (plan.tile_length > 0)
    return (chunks.sum().double() * (plan.block_m * plan.block_n) / _all_pairs(plan)).float()


def flops(plan: Plan, head_dim: int, value_dim: int | None = None) -> Tensor:
    """Floating-point operations of both products (2 per multiply-add): float64 scalar."""
    return pairs(plan).double() * (2 * (head_dim + (value_dim or head_dim)))


@dataclass(frozen=True, slots=True)
class Cost:
    """A plan's cost as numbers. plan_bytes: its index tensors."""

    density: float
    tile_density: float
    flops: float
    plan_bytes: int


def cost(plan: Plan, head_dim: int, value_dim: int | None = None) -> Cost:
    """The cost of a plan; waits for the device once."""
    found = torch.stack([density(plan).double(), tile_density(plan).double(), flops(plan, head_dim, value_dim)])
    share, tiles, operations = found.tolist()
    return Cost(share, tiles, operations, plan.num_bytes())


def _all_pairs(plan: Plan) -> int:
    return max(1, plan.heads[0] * plan.heads[1] * plan.queries * plan.keys)
