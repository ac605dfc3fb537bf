"""Sampled keys stand in for everything that is not read.

Shapes: see `hasten.sparse_attn.blocks`; M samples, R rows of the plan.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.blocks import Order, grouped
from hasten.sparse_attn.plan import Compensation
from hasten.sparse_attn.stand_ins.compensate import StandIn


class Samples(StandIn):
    """Keys drawn from the whole sequence, each counted n / M times (HyperAttention, Han et al. 2023, algorithm 3).

    n is the number of keys and M that of the samples, so the sum over samples that a row does not read exactly estimates
    the sum over its unread keys without bias. Samples that it does read are left out of its sum. The paper draws anew at
    each call; here it is one key out of each of M equal stretches, by `seed` (less variance, and repeatable).
    """

    kind = "samples"
    count: int = Field(default=256, ge=1)
    seed: int = 0

    def places(self, keys: int) -> Tensor:
        """Arranged places of the samples: int64 [M], on the CPU; at most one for each key."""
        count = min(self.count, keys)
        edges = torch.arange(count + 1) * keys // count
        share = torch.rand(count, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return edges[:-1] + (share * edges.diff()).long()

    def tables(
        self, k: Tensor, v: Tensor, order: Order, approximate: Tensor, squares: Tensor | None = None
    ) -> Compensation:
        """Tables with one entry per sample. A sample stands in where its block does."""
        b, hk, sk, _ = k.shape
        places = self.places(sk).to(k.device)
        block = order.labels()[:, places]
        planes, rows, _ = approximate.shape
        if block.shape[0] == 1:
            stands_in = approximate[:, :, block[0]]
        else:
            own = grouped(block, planes // block.shape[0])[:, None].expand(-1, rows, -1)
            stands_in = approximate.gather(2, own)
        log_sizes = torch.full((b * hk, places.numel()), sk / places.numel(), device=k.device).log()
        keys, values = (x[:, :, places].float().reshape(b * hk, places.numel(), -1) for x in (k, v))
        return Compensation(keys, values, log_sizes, stands_in.flatten(0, 1))
