"""What stands in for blocks that are not read: their mean key and value, in the same softmax.

Shapes: see `hasten.sparse_attn.blocks`; Dv value dimension, R rows of the plan.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.part import Part
from hasten.sparse_attn.blocks import SELECT, SPARSE, Blocks, Order, block_mean, grouped
from hasten.sparse_attn.extent import FULL, block_states
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.plan import Compensation, Output
from hasten.sparse_attn.sums import block_sums, of, slices


class StandIn(Part):
    """Base of what stands in for blocks that are not read. It joins the same softmax, by one of two ways: as tables, which
    are read together with the keys, or as sums of its own, which are merged afterwards."""

    def tables(
        self, k: Tensor, v: Tensor, order: Order, approximate: Tensor, squares: Tensor | None = None
    ) -> Compensation | None:
        """Tables for arranged k [B, Hk, Sk, D] and v [B, Hk, Sk, Dv]; None: there are none. approximate: bool
        [P1, Cq, Ck], of `approximate_map`. squares: float32 [B * Hk, D], of `query_squares`, where it is known."""
        return None

    def add(
        self, out: Output, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, approximate: Tensor, scale: float
    ) -> Output:
        """`out` with what is merged afterwards. q [B, Hq, Sq, D] in original order, k and v arranged."""
        return out


class Compensate(StandIn):
    """Blocks of keys that are not read count as their mean, as often as they have tokens.

    A block of n keys with mean c and mean value w adds n exp(s q.c) to the softmax's denominator and that times w to
    its numerator: SVG-EAR (Zhou et al. 2026, "linear compensation") for clusters, Sol-Attn (2026) for raster blocks; the
    samples of HyperAttention (Han et al. 2023), with their log weights, are the same sum. It costs one key per block.

    order: 1 is the papers' sum. 2 takes the spread of the keys within the block into account: the mean of exp over keys
    with covariance V is exp(s q.c + s^2 q.V.q / 2) where they are Gaussian; V is kept as its diagonal. exp is convex,
    so order 1 always underrates a block, and what it says of its own share of the mass (rho) is too good.

    most: the second order adds this much to a logit at most, for a query of usual size (ours). In blocks whose logits
    vary widely it would find the mass that is due to a few keys and give it the mean of all values, which is worse than
    to underrate it: on synthetic heads that look at neighbours, over tiles, more than twice the error of order 1. With the
    limit it is as good as order 1 there, better on clusters, and rho of clusters is as exact as without.
    """

    kind = "centroid"
    order: Literal[1, 2] = 2
    most: float = Field(default=0.5, gt=0)

    def tables(
        self, k: Tensor, v: Tensor, order: Order, approximate: Tensor, squares: Tensor | None = None
    ) -> Compensation:
        """See `centroids`. approximate: bool [P1, Cq, Ck]. Without `squares` the second order has no limit."""
        found = centroids(k, v, order, approximate.flatten(0, 1), second_order=self.order == 2)
        if found.variances is None or squares is None:
            return found
        added = torch.bmm(found.variances, squares[:, :, None]) / 2
        return replace(found, variances=found.variances * (self.most / added.clamp(min=self.most)))


def query_squares(q: Tensor, groups: int, scale: float) -> Tensor:
    """scale^2 times the mean square of the queries of each key head, by coordinate: float32 [B * Hk, D].

    q [B, Hq, Sq, D], in any order; at most about a thousand queries of each head are looked at.
    """
    b, hq, sq, d = q.shape
    some = q[:, :, :: max(1, sq // 1024)].float().reshape(b * hq // groups, -1, d)
    return some.square().mean(1) * (scale * scale)


def centroids(k: Tensor, v: Tensor, order: Order, approximate: Tensor, *, second_order: bool = False) -> Compensation:
    """Means of each block of `order` (the keys' side): what `approximate` (bool [R, Ck]) lets stand in.

    k [B, Hk, Sk, D] and v [B, Hk, Sk, Dv] arranged. The means are those of these tokens, in float32: centroids that a
    layout keeps from an earlier step (`Order.means`) would not do, since the sum has to add up to the blocks' own mass.
    Blocks that are padding or always read are 0 and never stand in, whatever they hold.
    """
    gone = (order.roles != SELECT)[:, None]
    keys = block_mean(k, order)
    variances = block_variance(k, order, keys).masked_fill_(gone, 0) if second_order else None
    values = block_mean(v, order).masked_fill_(gone, 0)
    log_sizes = order.sizes.float().log().masked_fill(gone[:, 0], -math.inf).expand(keys.shape[0], -1).contiguous()
    return Compensation(keys.masked_fill_(gone, 0), values, log_sizes, approximate, variances)


def block_variance(x: Tensor, order: Order, mean: Tensor) -> Tensor:
    """Mean squared distance of arranged x [B, H, S, D] from `mean` [B * H, C, D] of its block, by coordinate.

    float32 [B * H, C, D]. The mean is taken off first: a difference of squares would lose all digits of tight blocks.
    """
    rows, labels, found = x.flatten(0, 1), order.labels(), torch.empty_like(mean)
    for part in slices(rows.shape[0], rows.shape[1] * rows.shape[2]):
        centres = mean[part]
        own = of(labels, part) + torch.arange(centres.shape[0], device=x.device)[:, None] * order.count
        near = centres.reshape(-1, centres.shape[2]).index_select(0, own.reshape(-1)).view(rows[part].shape)
        found[part] = block_sums((rows[part].float() - near).square_(), of(order.bounds, part))
    return found.div_(order.sizes.clamp(min=1)[:, :, None])


def approximate_map(
    blocks: Blocks, keep: Tensor, *, groups: int = 1, mask: Mask | None = None, block_state: Tensor | None = None
) -> Tensor:
    """Pairs of blocks for which the mean may stand in: bool [P1, Cq, Ck]; P1 is that of the plan's rows.

    keep: bool [1 or Pq, Cq, Ck], roles applied. Selectable blocks that are not read, for sparse queries, and with a
    mask only those that lie wholly within what it allows: a mean over a block that a causal mask cuts would tell of
    the future. groups: query heads per key head. block_state: as in `pack`.
    """
    q, k = blocks.q.roles[:, None] == SPARSE, blocks.k.roles[None, :] == SELECT
    there = (grouped(blocks.k.sizes, groups) > 0)[:, None, :]
    found = ~keep & q & k & there
    if mask is None:
        return found
    state = block_states(blocks, mask, groups) if block_state is None else block_state
    return found & (state == FULL)


def log_mass(q: Tensor, tables: Compensation, scale: float, groups: int = 1) -> Tensor:
    """Logarithm of the mass that each block's mean stands for: float32 [Pq, M, Ck] for queries q [Pq, M, D]."""
    q = q.float()
    keys = tables.keys.repeat_interleave(groups, 0)
    found = torch.baddbmm(tables.log_sizes.repeat_interleave(groups, 0)[:, None, :], q, keys.mT, alpha=scale)
    if tables.variances is None:
        return found
    return found.baddbmm(q.square(), tables.variances.repeat_interleave(groups, 0).mT, alpha=scale * scale / 2)
