"""The plan in plain torch: fast on a CPU, right anywhere, and the twin that kernels are tested against.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D, Dv head dimensions, Pq = B * Hq planes of queries, Pk = B * Hk of keys,
C key blocks, R rows; G jobs of one batch (see `jobs`), M queries and N keys of each.

Everything is computed in float32 (float64 for float64 inputs) and rounded once. On a CPU the inner kernel is PyTorch's
own fused one for that device, which is dense: tiles that read the same keys become one job, the keys of a job are
gathered next to each other, and jobs of similar length run as one batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.sparse_attn.jobs import Batch, Index, Jobs, jobs_of
from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.plan import Compensation, Output, Plan

Part = tuple[Tensor, Tensor]
"""Output [G, M, D] and its LSE [G, M] over some of the keys of each job."""


def execute(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, compensation: Compensation | None = None
) -> Output:
    """Attention of `plan`: q [B, Hq, Sq, D] in original order, k [B, Hk, Sk, D] and v [B, Hk, Sk, Dv] arranged.

    Keys that no row reads may hold anything. Reads the plan on the host: on other devices than a CPU it waits for it.
    Not differentiable; see `autograd` for that.
    """
    with torch.no_grad():
        run = _Run.of(q, k, v, plan, scale, compensation)
        jobs = jobs_of(plan, compensation.approximate.any(1) if compensation is not None else None)
        for batch in jobs.batches():
            run.batch(jobs, batch)
        return run.output(q, v.shape[-1])


@dataclass(slots=True)
class _Run:
    """Inputs in the working precision, one row per token, and the outputs as they fill up.

    q: [Pq * Sq, D], k, v: [Pk, Sk, D], all padded to one head dimension. o: [Pq * Sq + 1, D], lse: [Pq * Sq + 1],
    with compensation a second one without it; the last place of each takes what padding computes.
    """

    plan: Plan
    scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: list[Tensor]
    stand_in: _StandIn | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, compensation: Compensation | None
    ) -> _Run:
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        wide = max(q.shape[-1], v.shape[-1])
        planes, places = plan.heads[0] * plan.heads[2], plan.heads[0] * plan.heads[1] * plan.queries
        k, v = (widened(x.to(exact).reshape(planes, plan.keys, -1), wide).contiguous() for x in (k, v))
        flat = widened(q.to(exact).reshape(places, -1), wide)
        o = flat.new_zeros(places + 1, v.shape[-1])
        lse = [flat.new_full((places + 1,), -math.inf) for _ in range(1 if compensation is None else 2)]
        stand_in = _StandIn.of(compensation, wide, scale, exact) if compensation is not None else None
        return cls(plan, scale, flat, k, v, o, lse, stand_in)

    def batch(self, jobs: Jobs, batch: Batch) -> None:
        """Compute one batch of jobs and put its outputs to their places."""
        index = jobs.queries(batch.jobs)
        at = self._tensor(index.places)
        q = self.q.index_select(0, at.view(-1)).view(*at.shape, -1)
        parts = self._exact(jobs, batch, q, at)
        nothing = (torch.zeros_like(q), q.new_full(q.shape[:2], -math.inf))
        o, lse = parts[0] if len(parts) == 1 else merge([nothing, *parts])
        found = [lse]
        if self.stand_in is not None:
            rows, planes = (self._tensor(x[batch.jobs]) for x in (jobs.row, jobs.key_plane))
            o, lse = merge([(o, lse), self.stand_in.part(q, rows, planes, self.scale)])
            found = [lse, *found]
        if index.real is not None:
            at = at.masked_fill(~self._tensor(index.real), self.q.shape[0])
        self.o.index_copy_(0, at.view(-1), o.reshape(-1, o.shape[-1]))
        for place, values in zip(self.lse, found, strict=True):
            place.index_copy_(0, at.view(-1), values.reshape(-1))

    def _exact(self, jobs: Jobs, batch: Batch, q: Tensor, at: Tensor) -> list[Part]:
        """What the jobs read of the keys themselves. With a mask, full chunks apart from those that it cuts."""
        planes = jobs.key_plane[batch.jobs]
        if batch.span is not None:
            low, high = batch.span
            together = slice(int(planes[0]), int(planes[0]) + len(planes))
            if (planes == range(together.start, together.stop)).all():
                return [softmax_part(q, self.k[together, low:high], self.v[together, low:high], None, self.scale)]
        if self.plan.mask is None:
            index = jobs.keys(batch.jobs)
            return [] if index is None else [self._gathered(q, index, self._tensor(planes), None)]
        parts = []
        for part, own in (("full", None), ("ragged", at % self.plan.queries)):
            index = jobs.keys(batch.jobs, part)
            if index is not None:
                parts.append(self._gathered(q, index, self._tensor(planes), own))
        return parts

    def _gathered(self, q: Tensor, index: Index, planes: Tensor, q_positions: Tensor | None) -> Part:
        """Attention to gathered keys; the mask is asked where the original positions of the queries are given."""
        at = self._tensor(index.places)
        bias, forbidden = None, None
        if index.real is not None:
            forbidden = ~self._tensor(index.real)[:, None]
        if q_positions is not None:
            outside = ~self._allowed(q_positions, at, planes)
            forbidden = outside if forbidden is None else outside | forbidden
        if forbidden is not None:
            bias = q.new_zeros(forbidden.shape).masked_fill_(forbidden, -math.inf)
        flat = (at + planes[:, None] * self.plan.keys).view(-1)
        k, v = (x.view(-1, x.shape[-1]).index_select(0, flat).view(*at.shape, -1) for x in (self.k, self.v))
        o, lse = softmax_part(q, k, v, bias, self.scale)
        if index.real is not None:
            # A job without keys was padded with those of another, which may hold anything.
            none = ~self._tensor(index.real[:, 0])
            o, lse = o.masked_fill(none[:, None, None], 0), lse.masked_fill(none[:, None], -math.inf)
        return o, lse

    def _allowed(self, q_positions: Tensor, at: Tensor, planes: Tensor) -> Tensor:
        """bool [G, M, N], by original positions."""
        plan = self.plan
        assert plan.mask is not None
        if plan.k_perm is not None:
            at = plan.k_perm[planes[:, None] if plan.k_perm.shape[0] > 1 else 0, at]
        return plan.mask.allowed(q_positions, at, plan.keys)

    def _tensor(self, values: object) -> Tensor:
        """A table of the host, on the device."""
        return torch.as_tensor(values, device=self.q.device)

    def output(self, q: Tensor, value_dim: int) -> Output:
        """The outputs, in the shape and dtype of the queries."""
        lse = [x[:-1].view(q.shape[:3]) for x in self.lse]
        o = self.o[:-1, :value_dim].to(q.dtype).view(*q.shape[:3], -1)
        return Output(o, lse[0], lse[1] if len(lse) > 1 else None)


@dataclass(frozen=True, slots=True)
class _StandIn:
    """Compensation as extra keys: the second order is one more product, over squared queries and variances.

    keys, values: [Pk, C, 1 or 2 times the head dimension]; log_sizes: [Pk, C]; approximate: bool [R, C].
    """

    keys: Tensor
    values: Tensor
    log_sizes: Tensor
    approximate: Tensor
    second: bool

    @classmethod
    def of(cls, found: Compensation, wide: int, scale: float, exact: torch.dtype) -> _StandIn:
        # The means of padding may be anything; the weight of what nobody asks for is 0, but 0 times NaN is not.
        unused = ~found.approximate.any(0)[:, None]
        keys = widened(found.keys.to(exact), wide).masked_fill(unused, 0)
        if found.variances is not None:
            spread = widened(found.variances.to(exact), wide).masked_fill(unused, 0)
            keys = torch.cat([keys, spread * (scale / 2)], -1)
        values = widened(found.values.to(exact), keys.shape[-1]).masked_fill(unused, 0)
        return cls(keys, values, found.log_sizes.to(exact), found.approximate, found.variances is not None)

    def part(self, q: Tensor, rows: Tensor, planes: Tensor, scale: float) -> Part:
        """Attention of q [G, M, D] to the blocks that stand in for what rows [G] of planes [G] do not read."""
        sizes = self.log_sizes.index_select(0, planes)
        bias = sizes.masked_fill(~self.approximate.index_select(0, rows), -math.inf)[:, None]
        both = torch.cat([q, q.square()], -1) if self.second else q
        o, lse = softmax_part(both, self.keys.index_select(0, planes), self.values.index_select(0, planes), bias, scale)
        return o[..., : q.shape[-1]], lse


def softmax_part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Part:
    """softmax(scale q k^T + bias) v and its LSE, for q [G, M, D], k, v [G, N, D], bias [G, 1 or M, N].

    0 and -inf where every bias of a query is -inf. On a CPU by PyTorch's fused kernel, which has one head dimension.
    """
    if q.device.type != "cpu":
        return plain_part(q, k, v, bias, scale)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, None], k[:, None], v[:, None], attn_mask=None if bias is None else bias[:, None], scale=scale
    )
    if bias is None:
        return o[:, 0], lse[:, 0]
    # Where everything is masked that kernel says 0, for the LSE too.
    return o[:, 0], lse[:, 0].masked_fill(bias.amax(-1) == -math.inf, -math.inf)


def plain_part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Part:
    """As `softmax_part`, in matrix products and exponentials."""
    logits = q @ k.mT * scale
    logits = logits if bias is None else logits + bias
    lse = logits.logsumexp(-1)
    return (logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp() @ v, lse


def widened(x: Tensor, wide: int) -> Tensor:
    """x [..., D], zeros appended to `wide`: the CPU kernel has one head dimension for keys and values."""
    return x if x.shape[-1] == wide else F.pad(x, (0, wide - x.shape[-1]))
