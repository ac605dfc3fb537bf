"""Routing by error: read exactly what its stand-in would get wrong, not what has most mass.

Shapes: see `hasten.sparse_attn.blocks`; Dv value dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hasten.sparse_attn.blocks import NEVER, block_mean, grouped
from hasten.sparse_attn.scorers.scorer import Scorer, ScorerState, View, products, readable
from hasten.sparse_attn.stand_ins.compensate import block_variance

LARGEST = 20.0
"""Variances of logits within a block count as at most this much; exp of more says nothing."""

SMALLEST = 1e-30
"""Relative errors count as at least this much: a block of one token is its own mean, but may be read all the same."""


class ErrorRouting(Scorer):
    """log of the error that a block's mean would make in the output, per token of the block (SVG-EAR, 2026).

    SVG-EAR estimates the error of each block's linear compensation by a probe and computes the blocks with the highest
    error for their cost. The estimate here is ours, from moments of the block. For logits with variance u within the
    block (u = scale^2 mean(q^2) . var(k)), keys that are Gaussian, a mean value w and values with variance t,
        error = mass (sqrt(exp(u) - 1) sqrt(t) + (exp(u / 2) - 1) |w - o|),
    the first part because weights and values vary together, at worst; the second because the block's mass is too low;
    with second-order compensation (order=2) there is no second part. o is the estimated output of the query block.

    Without values (`View.v`), |w - o| and t are 1. per_token: divide by the tokens of a block, its cost; with equal
    blocks this changes nothing. A share of these scores is a share of error, so `TopP` bounds what remains of it.
    """

    kind = "error"
    order: Literal[1, 2] = 2
    per_token: bool = True

    def start(self) -> ScorerState:
        return _ErrorRouting(self)


class _ErrorRouting(ScorerState):
    needs_values = True

    def __init__(self, part: ErrorRouting) -> None:
        self.part = part

    def scores(self, view: View) -> Tensor:
        blocks, groups = view.blocks, view.groups
        q, k = block_mean(view.q, blocks.q), block_mean(view.k, blocks.k)
        squares = block_mean(view.q.float().square(), blocks.q)
        spread = products(squares, block_variance(view.k, blocks.k, k), view.scale * view.scale).clamp_(max=LARGEST)
        log_sizes = grouped(blocks.k.sizes, groups).float().log()[:, None, :]
        mass = readable(products(q, k, view.scale) + log_sizes + spread / 2, view)
        error = spread.expm1().sqrt_()
        if view.v is not None:
            error = self._of_values(view, view.v, mass, spread, error)
        elif self.part.order == 1:
            error = error + (spread / 2).expm1_()
        found = mass + error.clamp(min=SMALLEST).log()
        return readable(found - log_sizes if self.part.per_token else found, view)

    def _of_values(self, view: View, v: Tensor, mass: Tensor, spread: Tensor, error: Tensor) -> Tensor:
        """Relative error of each block, times the spread of its values and their distance from the output."""
        gone = (view.blocks.k.roles == NEVER)[:, None]
        values = block_mean(v, view.blocks.k).masked_fill_(gone, 0)
        deviation = block_variance(v, view.blocks.k, values).sum(-1).sqrt_().repeat_interleave(view.groups, 0)
        error = error * deviation[:, None, :]
        if self.part.order == 2:
            return error
        values = values.repeat_interleave(view.groups, 0)
        output = torch.bmm(mass.expand(values.shape[0], -1, -1).softmax(-1).nan_to_num(0.0), values)
        return error + (spread / 2).expm1_() * torch.cdist(output, values)
