"""The plan in plain torch: fast on a CPU, right anywhere, and the twin that kernels are tested against.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D, Dv head dimensions, Pq = B * Hq planes of queries, Pk = B * Hk of keys,
C key blocks, R rows; G jobs of one batch (see `jobs`), M queries and N keys of each.

Everything is computed in float32 (float64 for float64 inputs) and rounded once. On a CPU the inner kernel is PyTorch's
own fused one for that device, which is dense: tiles that read the same keys become one job, the keys of a job are
gathered next to each other, and jobs of similar length run as one batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.sparse_attn.backends.jobs import Batch, Index, Jobs, jobs_of, tables
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
        jobs = jobs_of(plan, compensation.approximate.any(1) if compensation is not None else None)
        batches = jobs.batches(torch.get_num_threads())
        whole = [batch for batch in batches if batch.span is not None]
        gathered = [batch for batch in batches if batch.span is None]
        run = _Run.of(q, k, v, jobs, whole + gathered, scale, compensation)
        for batch in whole:
            run.batch(batch, [])
        for some in tables(gathered):
            names = ("all",) if plan.mask is None else ("full", "ragged")
            parts = [jobs.keys(some, name) for name in names]
            for number, batch in enumerate(some):
                run.batch(batch, [part[number] for part in parts])
        return run.output(q, v.shape[-1])


@dataclass(slots=True)
class _Run:
    """Inputs in the working precision, the queries of all jobs in the order of their batches, and their outputs so far.

    q: [slots, D], kv: [Pk * Sk, 2 D], keys and values beside each other so that they are gathered at once, all padded
    to one head dimension D. places: int64 [slots], plane * Sq + original position; Pq * Sq for padding. o, lse: a list of
    outputs, with compensation a second list of LSEs without it. space: what is gathered lies here, for all batches (new
    memory for each would cost about as much as the copy).
    """

    jobs: Jobs
    scale: float
    q: Tensor
    kv: Tensor
    places: Tensor
    stand_in: _StandIn | None
    space: Tensor
    o: list[Tensor] = field(default_factory=list)
    lse: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    done: int = 0

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, jobs: Jobs, batches: list[Batch], scale: float,
        compensation: Compensation | None,
    ) -> _Run:  # fmt: skip
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        wide = max(q.shape[-1], v.shape[-1])
        kv = torch.cat([widened(x.to(exact), wide).reshape(-1, wide) for x in (k, v)], 1)
        places, real = jobs.queries(batches) if batches else (np.zeros(0, np.int64), None)
        at = torch.as_tensor(places, device=q.device)
        flat = widened(q.to(exact).reshape(-1, q.shape[-1]).index_select(0, at), wide)
        if real is not None:
            at = at.masked_fill(~torch.as_tensor(real, device=q.device), q.shape[:3].numel())
        stand_in = _StandIn.of(compensation, wide, exact) if compensation is not None else None
        room = max((batch.jobs.size * batch.keys for batch in batches if batch.span is None), default=0)
        return cls(jobs, scale, flat, kv, at, stand_in, kv.new_empty(room, kv.shape[1]))

    def batch(self, batch: Batch, indices: list[Index | None]) -> None:
        """Compute one batch of jobs, from its range of keys or from what it gathers (in two parts with a mask)."""
        size = len(batch.jobs), batch.queries
        own = slice(self.done, self.done + size[0] * size[1])
        q = self.q[own].view(*size, -1)
        parts = [self._whole(q, batch)] if batch.span is not None else []
        for index, asks in zip(indices, (len(indices) == 1, False), strict=False):
            if index is not None:
                parts.append(self._gathered(q, index, None if asks else self.places[own].view(size)))
        o, lse = parts[0] if parts else (torch.zeros_like(q), q.new_full(size, -math.inf))
        for part in parts[1:]:
            o, lse = both((o, lse), part)
        if self.stand_in is not None:
            rows, planes = (self._tensor(x[batch.jobs]) for x in (self.jobs.row, self.jobs.key_plane))
            self.lse[1].append(lse.flatten())
            o, lse = both((o, lse), self.stand_in.part(q, rows, planes, self.scale))
        self.o.append(o.reshape(-1, o.shape[-1]))
        self.lse[0].append(lse.flatten())
        self.done = own.stop

    def _whole(self, q: Tensor, batch: Batch) -> Part:
        """Attention to a range of keys where they lie."""
        assert batch.span is not None
        first = int(self.jobs.key_plane[batch.jobs[0]])
        kv = self.kv.view(-1, self.jobs.plan.keys, self.kv.shape[1])
        k, v = kv[first : first + len(q), batch.span[0] : batch.span[1]].chunk(2, -1)
        return softmax_part(q, k, v, None, self.scale)

    def _gathered(self, q: Tensor, index: Index, places: Tensor | None) -> Part:
        """Attention to gathered keys; the mask is asked where the places of the queries are given."""
        at = self._tensor(index.places)
        bias, forbidden = None, None
        if index.real is not None:
            forbidden = ~self._tensor(index.real)[:, None]
        if places is not None:
            outside = ~allowed(self.jobs.plan, places, at)
            forbidden = outside if forbidden is None else outside | forbidden
        if forbidden is not None:
            bias = q.new_zeros(forbidden.shape).masked_fill_(forbidden, -math.inf)
        kv = torch.index_select(self.kv, 0, at.view(-1), out=self.space[: at.numel()])
        k, v = kv.view(*at.shape, -1).chunk(2, -1)
        o, lse = softmax_part(q, k, v, bias, self.scale)
        if index.real is not None and not index.real[:, 0].all():
            # A job without keys was padded with those of another: what is NaN there must not be NaN here.
            none = ~self._tensor(index.real[:, 0])
            o, lse = o.masked_fill(none[:, None, None], 0), lse.masked_fill(none[:, None], -math.inf)
        return o, lse

    def _tensor(self, values: npt.NDArray[Any]) -> Tensor:
        """A table of the host, on the device."""
        found = torch.from_numpy(values)
        return found if self.q.device.type == "cpu" else found.to(self.q.device)

    def output(self, q: Tensor, value_dim: int) -> Output:
        """The outputs at their places, in the dtype of the queries. One place more takes what padding computed."""
        count = q.shape[:3].numel()
        o = self.q.new_zeros(count + 1, self.q.shape[1])
        lses = [self.q.new_full((count + 1,), -math.inf) for _ in range(1 if self.stand_in is None else 2)]
        if self.o:
            o.index_copy_(0, self.places, torch.cat(self.o))
            for lse, parts in zip(lses, self.lse, strict=False):
                lse.index_copy_(0, self.places, torch.cat(parts))
        lses = [lse[:-1].view(q.shape[:3]) for lse in lses]
        o = o[:-1, :value_dim].to(q.dtype).view(*q.shape[:3], value_dim)
        return Output(o, lses[0], lses[1] if len(lses) > 1 else None)


def allowed(plan: Plan, queries: Tensor, keys: Tensor) -> Tensor:
    """What the mask of `plan` says of each pair: bool [G, M, N]. queries [G, M]: plane * Sq + original position (or
    beyond, for padding); keys [G, N]: key plane * Sk + arranged place."""
    assert plan.mask is not None
    planes, places = keys // plan.keys, keys % plan.keys
    if plan.k_perm is not None:
        places = plan.k_perm[planes if plan.k_perm.shape[0] > 1 else 0, places]
    return plan.mask.allowed(queries % plan.queries, places, plan.keys)


@dataclass(frozen=True, slots=True)
class _StandIn:
    """Compensation as extra keys. keys, values, variances (or None): [Pk, C, D]; log_sizes: [Pk, C]; approximate: bool
    [R, C]."""

    keys: Tensor
    values: Tensor
    variances: Tensor | None
    log_sizes: Tensor
    approximate: Tensor

    @classmethod
    def of(cls, found: Compensation, wide: int, exact: torch.dtype) -> _StandIn:
        # The means of padding may be anything; the weight of what nobody asks for is 0, but 0 times NaN is not.
        unused = ~found.approximate.any(0)[:, None]
        keys, values, variances = (
            None if x is None else widened(x.to(exact), wide).masked_fill(unused, 0)
            for x in (found.keys, found.values, found.variances)
        )
        assert keys is not None and values is not None
        return cls(keys, values, variances, found.log_sizes.to(exact), found.approximate)

    def part(self, q: Tensor, rows: Tensor, planes: Tensor, scale: float) -> Part:
        """Attention of q [G, M, D] to the blocks that stand in for what rows [G] of planes [G] do not read."""
        sizes = self.log_sizes.index_select(0, planes)
        bias = sizes.masked_fill(~self.approximate.index_select(0, rows), -math.inf)[:, None]
        if self.variances is not None:
            spread = self.variances.index_select(0, planes).mT
            bias = torch.baddbmm(bias, q.square(), spread, alpha=scale**2 / 2)
        return softmax_part(q, self.keys.index_select(0, planes), self.values.index_select(0, planes), bias, scale)


def both(a: Part, b: Part) -> Part:
    """As `merge.merge`, of two parts that are 0 where their LSE is -inf: in one pass over the outputs."""
    share = (b[1] - a[1]).sigmoid().nan_to_num(0.0)
    return torch.lerp(a[0], b[0], share[..., None]), torch.logaddexp(a[1], b[1])


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
