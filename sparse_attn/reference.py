"""The truth: attention computed pair by pair in float64, from the map of blocks and not from a plan; and dense.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D, Dv head dimensions, Pq = B * Hq planes of queries, Pk = B * Hk of
keys, Cq, Ck blocks, R rows. Everything here is in original token order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.sparse_attn.blocks import Blocks, Order
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.plan import Compensation, Output

SLICE = 2**24
"""`dense` holds at most about this many logits of one slice of queries."""


def reference(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, keep: Tensor, *,
    scale: float | None = None, mask: Mask | None = None, compensation: Compensation | None = None,
) -> Output:  # fmt: skip
    """Attention over the pairs that `keep` and `mask` allow, all pairs at once: for tests, at small sizes.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] in original order; keep: bool [1 or Pq, Cq, Ck], after
    `Blocks.force`. `o`, `lse` and `lse_exact` are float64, whatever the inputs are.
    """
    (b, hq, sq, d), (hk, sk) = q.shape, k.shape[1:3]
    groups, scale = hq // hk, d**-0.5 if scale is None else scale
    q = q.double().reshape(b * hq, sq, d)
    k, v = (x.double().reshape(b * hk, sk, -1).repeat_interleave(groups, 0) for x in (k, v))
    readable = token_map(blocks, keep, b * hq, groups)
    if mask is not None:
        readable &= mask.allowed(torch.arange(sq, device=q.device), torch.arange(sk, device=q.device), sk)
    logits = (q @ k.mT * scale).masked_fill(~readable, float("-inf"))
    o, lse = _softmax(logits, v)
    exact = None
    if compensation is not None:
        exact = lse.view(b, hq, sq)
        more, means = _centroid_logits(q, compensation, blocks.q, scale, groups)
        o, lse = _softmax(torch.cat([logits, more], -1), torch.cat([v, means], 1))
    return Output(o.view(b, hq, sq, -1), lse.view(b, hq, sq), exact)


def token_map(blocks: Blocks, keep: Tensor, planes: int, groups: int) -> Tensor:
    """Which key each query reads by the map of blocks: bool [Pq, Sq, Sk], original order. keep: see `reference`."""
    q_block, k_block = _block_of(blocks.q), _block_of(blocks.k)
    rows = []
    for plane in range(planes):
        own = keep[plane if keep.shape[0] > 1 else 0]
        q = q_block[plane if q_block.shape[0] > 1 else 0]
        k = k_block[plane // groups if k_block.shape[0] > 1 else 0]
        rows.append(own[q][:, k])
    return torch.stack(rows)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Mask | None = None) -> Output:
    """Dense attention with its LSE in plain torch, sliced along the queries: float64 for float64 inputs, else float32.

    Shapes as in `reference`. `o` comes back in the dtype of q. For speed without an LSE there is PyTorch's own
    `scaled_dot_product_attention`.
    """
    (b, hq, sq, d), (hk, sk) = q.shape, k.shape[1:3]
    groups, scale = hq // hk, d**-0.5 if scale is None else scale
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.to(exact).repeat_interleave(groups, 1) for x in (k, v))
    step = max(1, SLICE // max(1, b * hq * sk))
    parts = []
    for start in range(0, sq, step):
        piece = q[:, :, start : start + step].to(exact)
        logits = piece @ k.mT * scale
        if mask is not None:
            places = torch.arange(start, start + piece.shape[2], device=q.device)
            logits.masked_fill_(~mask.allowed(places, torch.arange(sk, device=q.device), sk), float("-inf"))
        parts.append(_softmax(logits, v))
    o, lse = (torch.cat(pieces, 2) for pieces in zip(*parts, strict=True))
    return Output(o.to(q.dtype), lse)


def _softmax(logits: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) v and the LSE; 0 and -inf where every logit is -inf."""
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return weights @ v, lse


def _block_of(order: Order) -> Tensor:
    """Block of each token, in original order: int64 [P1, S]."""
    labels = order.labels()
    if order.perm is None:
        return labels
    planes = max(labels.shape[0], order.perm.shape[0])
    labels, perm = labels.expand(planes, -1), order.perm.expand(planes, -1)
    return torch.empty_like(labels).scatter_(1, perm, labels)


def _centroid_logits(
    q: Tensor, compensation: Compensation, order: Order, scale: float, groups: int
) -> tuple[Tensor, Tensor]:
    """Logits [Pq, Sq, C] of what stands in for the blocks that are not read (-inf elsewhere), and its values."""
    keys, values, sizes = (
        x.double().repeat_interleave(groups, 0)
        for x in (compensation.keys, compensation.values, compensation.log_sizes)
    )
    logits = q @ keys.mT * scale + sizes[:, None]
    if compensation.variances is not None:
        logits = logits + q.square() @ compensation.variances.double().repeat_interleave(groups, 0).mT * (scale**2 / 2)
    rows = compensation.approximate.view(-1, order.count, keys.shape[1])
    own = _block_of(order)
    planes = q.shape[0]
    stands = rows.expand(planes, -1, -1).gather(1, own.expand(planes, -1)[..., None].expand(-1, -1, keys.shape[1]))
    return logits.masked_fill(~stands, float("-inf")), values
