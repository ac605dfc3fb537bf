"""How much attention each key gets: the torch twin of the kernel that sums columns.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D head dimension, Pk = B * Hk planes of keys; G jobs of one batch, M
queries and N keys of each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.sparse_attn.backends.executor import allowed
from hasten.sparse_attn.backends.jobs import Batch, Index, Jobs, jobs_of, tables
from hasten.sparse_attn.plan import Plan

SLICE = 2**22
"""At most about this many probabilities are held at a time."""


def column_sums(q: Tensor, k: Tensor, lse: Tensor, plan: Plan, scale: float) -> Tensor:
    """Sum over queries of exp(scale q.k - lse), for the pairs that `plan` reads: float32 [B, Hk, Sk], original order.

    q [B, Hq, Sq, D] in original order, k [B, Hk, Sk, D] arranged, lse float [B, Hq, Sq] (of this plan or of any other
    attention, so sums need not be shares). The query heads of a key head are summed: a key is kept or dropped for all
    of them. Queries whose lse is -inf count nothing. This is the accumulated attention score of H2O (2306.14048,
    section 4), here of what was read only. Reads the plan on the host.
    """
    with torch.no_grad():
        found = q.new_zeros(plan.heads[0] * plan.heads[2] * plan.keys, dtype=torch.float32)
        lse = lse.float().reshape(-1)
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        jobs = jobs_of(plan)
        for some in tables(jobs.batches(torch.get_num_threads())):
            for batch, index in zip(some, jobs.keys(some), strict=True):
                if index is not None:
                    _add(found, q, k, lse, jobs, batch, index, scale)
        found = found.view(plan.heads[0] * plan.heads[2], plan.keys)
        if plan.k_perm is not None:
            found = torch.empty_like(found).scatter_(1, plan.k_perm.expand_as(found), found)
        return found.view(plan.heads[0], plan.heads[2], plan.keys)


def _add(
    found: Tensor, q: Tensor, k: Tensor, lse: Tensor, jobs: Jobs, batch: Batch, index: Index, scale: float
) -> None:
    """The columns of one batch, added to `found` [Pk * Sk]."""
    places = torch.as_tensor(index.places, device=q.device)
    keys = k.reshape(-1, k.shape[-1])[places].float()
    flat, real = jobs.queries([batch])
    at = torch.as_tensor(flat, device=q.device).view(len(batch.jobs), -1)
    own = lse[at]
    if real is not None:
        own = own.masked_fill(~torch.as_tensor(real, device=q.device).view(at.shape), math.inf)
    sums = torch.zeros_like(places, dtype=torch.float32)
    step = max(1, SLICE // places.numel())
    for start in range(0, at.shape[1], step):
        some = at[:, start : start + step]
        logits = q.reshape(-1, q.shape[-1])[some].float() @ keys.mT * scale
        if jobs.plan.mask is not None:
            logits = logits.masked_fill(~allowed(jobs.plan, some, places), -math.inf)
        sums += (logits - own[:, start : start + step, None]).exp().sum(1)
    if index.real is not None:
        sums = sums.masked_fill(~torch.as_tensor(index.real, device=q.device), 0)
    found.index_add_(0, places.view(-1), sums.view(-1))
