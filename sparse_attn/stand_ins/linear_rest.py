"""Linear attention stands in for everything that is not read: the extreme of compensation.

Shapes: see `hasten.sparse_attn.blocks`; F features, Dv value dimension.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.blocks import Blocks
from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.stand_ins.compensate import StandIn
from hasten.sparse_attn.stand_ins.linear import projection, random_features, rest


class LinearRest(StandIn):
    """One state of F x Dv numbers per block of keys instead of its mean (LiT, arXiv 2501.12976; Lightning Attention-2,
    arXiv 2401.04658), merged with the exact part by its own denominator.

    Without training the features have to be in units of exp: positive random ones (Performer, arXiv 2009.14794). They
    estimate the sum over unread keys without bias, but with noise that grows as the logits do; means (`Compensate`) are
    nearer wherever blocks are alike. Trained features (LiT's relu) go through `linear_attention` and `merge` by hand.

    features: F, more are dearer and less noisy. seed: of the projection.
    """

    kind: ClassVar[str] = "linear"
    features: int = Field(default=256, ge=1)
    seed: int = 0

    def add(
        self, out: Output, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, approximate: Tensor, scale: float
    ) -> Output:
        rows = projection(self.features, q.shape[-1], self.seed, q.device)
        x, of_queries = random_features(blocks.q.arrange(q), rows, scale, keys=False)
        y, of_keys = random_features(k, rows, scale, keys=True)
        groups = q.shape[1] // k.shape[1]
        sums = rest(x, y, v, blocks, approximate, "none")
        o, lse = sums.pair(of_queries + of_keys.repeat_interleave(groups, 1))
        parts = [(out.o, out.lse), (blocks.q.restore(o), blocks.q.restore(lse[..., None])[..., 0])]
        o, lse = merge(parts)
        return replace(out, o=o, lse=lse, lse_exact=out.lse)
