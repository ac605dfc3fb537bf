"""Scorers that know the true mass of each pair of blocks: by computing it, or from the last dense step.

Shapes: see `hasten.sparse_attn.blocks`; M queries.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.blocks import NEVER
from hasten.sparse_attn.scorers.scorer import Scorer, ScorerState, View, logarithm, readable
from hasten.sparse_attn.sums import block_sums, key_sums

ELEMENTS = 2**24
"""Attention scores that are held at a time, in elements."""


class Oracle(Scorer):
    """The true mass of every pair of blocks, from all of q.k: the limit that other scorers are compared with.

    As dear as dense attention without its values; for benchmarks.
    """

    kind = "oracle"

    def start(self) -> ScorerState:
        return _Oracle()


class _Oracle(ScorerState):
    def scores(self, view: View) -> Tensor:
        return readable(logarithm(block_mass(view)), view)


class CachedMass(Scorer):
    """The mass of every pair of blocks at the last dense step (AdaSpa, Xia et al. 2025, "LSE-cached search").

    Which blocks matter changes little from step to step. A dense step gives its LSE, with which exact masses are one
    more pass over q.k, without a softmax of their own; the steps that follow choose by them. AdaSpa fuses this pass
    with the dense one by the LSE of the dense step before; here it is the LSE of the same step, so masses are exact.

    samples: queries of each block that are looked at, spread evenly; None: all, as in the paper. Until a dense step was
    seen, everything is read. Blocks have to stay what they are between steps: layouts that follow the values (k-means,
    trees, hashes) are refused.
    """

    kind = "cached-mass"
    samples: int | None = Field(default=None, ge=1)

    def start(self) -> ScorerState:
        return _CachedMass(self.samples)


class _CachedMass(ScorerState):
    needs_lse = True

    def __init__(self, samples: int | None) -> None:
        self.samples = samples
        self._held: Tensor | None = None

    def observe(self, view: View, lse: Tensor) -> None:
        _refuse_moving(view)
        self._held = logarithm(block_mass(view, lse, self.samples))

    def scores(self, view: View) -> Tensor:
        _refuse_moving(view)
        shape = (view.q.shape[0] * view.q.shape[1], view.blocks.q.count, view.blocks.k.count)
        if self._held is None or self._held.shape != shape:
            return readable(view.q.new_full((1, *shape[1:]), math.inf, dtype=torch.float32), view)
        return readable(self._held, view)


def _refuse_moving(view: View) -> None:
    for order in (view.blocks.q, view.blocks.k):
        if order.means is not None or (order.perm is not None and order.perm.shape[0] > 1):
            raise UsageError(
                "The scorer cached-mass remembers the mass of blocks, but this layout makes other blocks at each step."
                " Use a layout that stays (identity, tiles, curve, swap), or the scorer centroid."
            )


def block_mass(view: View, lse: Tensor | None = None, samples: int | None = None) -> Tensor:
    """Mean softmax mass that the queries of a block give to the keys of a block: float32 [B * Hq, Cq, Ck].

    lse: [B, Hq, Sq], arranged, where it is known. samples: queries looked at per block; None: all. The scores of a few
    rows are there at a time, never all of them. Blocks without queries have 0.
    """
    blocks, groups = view.blocks, view.groups
    q, k = view.q.flatten(0, 1), view.k.flatten(0, 1)
    found = q.new_zeros(q.shape[0], blocks.q.count, blocks.k.count, dtype=torch.float32)
    places, bounds = _looked_at(view, samples)
    own_k = blocks.k.labels()
    for plane in range(q.shape[0]):
        own = plane // groups
        keys, columns = k[own].float(), own_k[own % own_k.shape[0]]
        padding = blocks.k.roles[columns] == NEVER
        rows, own_bounds = places[plane % places.shape[0]], bounds[plane % bounds.shape[0]]
        step = max(1, ELEMENTS // keys.shape[0])
        for at in range(0, rows.numel(), step):
            some = rows[at : at + step]
            logits = (q[plane, some].float() @ keys.mT).mul_(view.scale).masked_fill_(padding, -math.inf)
            _bar(logits, view, plane, some)
            total = logits.logsumexp(-1) if lse is None else lse.flatten(0, 1)[plane, some].float()
            shares = logits.sub_(total[:, None]).exp_().nan_to_num_(0.0)
            sums = key_sums(shares[None], columns[None], blocks.k.count)
            found[plane] += block_sums(sums, own_bounds[None], at)[0]
    if samples is not None:
        return found.div_(samples)
    return found.div_(blocks.q.sizes.clamp(min=1)[:, :, None])


def _looked_at(view: View, samples: int | None) -> tuple[Tensor, Tensor]:
    """Arranged places of the queries that are looked at, int64 [P1, M], and where those of each block begin among them."""
    order = view.blocks.q
    if samples is None:
        return torch.arange(order.length, device=view.q.device)[None], order.bounds
    at = (torch.arange(samples, device=view.q.device) + 0.5) / samples
    places = order.bounds[:, :-1, None] + (at * order.sizes[:, :, None]).long()
    bounds = torch.arange(order.count + 1, dtype=torch.int32, device=view.q.device) * samples
    return places.clamp(max=order.length - 1).flatten(1).long(), bounds[None]


def _bar(logits: Tensor, view: View, plane: int, rows: Tensor) -> None:
    """-inf where the mask forbids; logits [M, Sk] of arranged queries `rows` of a plane."""
    if view.mask is None:
        return
    q, k = view.blocks.q.perm, view.blocks.k.perm
    k_at = torch.arange(logits.shape[1], device=logits.device) if k is None else k[plane // view.groups % k.shape[0]]
    q_at = rows if q is None else q[plane % q.shape[0], rows]
    logits.masked_fill_(~view.mask.allowed(q_at, k_at, logits.shape[1]), -math.inf)
