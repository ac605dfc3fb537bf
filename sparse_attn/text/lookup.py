"""Squeezed Attention: the prompt's keys are clustered once, and a query reads the clusters whose centroids it is near
to (2411.09688).

Shapes: B batch, Hq, Hk heads, Pk = B * Hk planes, n queries, P keys of the prompt, C clusters, D, Dv head dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.blocks import Blocks, Order, block_mean
from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.selectors.selector import Selector, SelectorState
from hasten.sparse_attn.selectors.top import candidates, key_sizes, shares
from hasten.sparse_attn.text.decode import decode, select, workers
from hasten.sparse_attn.text.reader import Everything, Reader, ReaderState, Witness

PRODUCTS = 1 << 24
"""Products of keys and centroids held at once: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """Keys of a fixed prompt in clusters. order: places cluster by cluster, with its bounds and the mean key of each
    (`Order.means`, float32 [Pk, C, D])."""

    order: Order

    @property
    def means(self) -> Tensor:
        """float32 [Pk, C, D]."""
        assert self.order.means is not None
        return self.order.means


def cluster(k: Tensor, count: int, rounds: int = 4, first: Tensor | None = None) -> Clusters:
    """k-means of k [B, Hk, P, D] by cosine, each head by itself, from centroids at evenly spaced places.

    A cluster that loses all its keys keeps its direction. Keys before first (int64 [B]: padding) stand in front of
    cluster 0 and belong to none.
    """
    b, hk, p, d = k.shape
    keys = k.reshape(b * hk, p, d).float()
    unit = torch.nn.functional.normalize(keys, dim=-1)
    begin = torch.zeros(b, dtype=torch.int64, device=k.device) if first is None else first
    begin = begin.repeat_interleave(hk)[:, None]
    seeds = begin + (torch.arange(count, device=k.device) * (p - begin)) // count
    centroids = unit.gather(1, seeds.clamp(max=p - 1)[..., None].expand(-1, -1, d))
    padding = torch.arange(p, device=k.device) < begin
    label = _nearest(unit, centroids, padding)
    for _ in range(rounds):
        sums = torch.zeros(b * hk, count + 1, d, device=k.device)
        sums.scatter_add_(1, label[..., None].expand(-1, -1, d), unit)
        sums = sums[:, 1:]
        moved = sums.norm(dim=-1, keepdim=True) > 0
        centroids = torch.where(moved, torch.nn.functional.normalize(sums, dim=-1), centroids)
        label = _nearest(unit, centroids, padding)
    perm = label.argsort(dim=1, stable=True)
    numbers = torch.arange(1, count + 2, device=k.device).expand(b * hk, -1).contiguous()
    bounds = torch.searchsorted(label.gather(1, perm), numbers).int()
    sorted_keys = keys.gather(1, perm[..., None].expand(-1, -1, d)).view(b, hk, p, d)
    roles = torch.zeros(count, dtype=torch.int8, device=k.device)
    # One more block in front while the means are taken: the padding.
    front = torch.cat([torch.zeros_like(bounds[:, :1]), bounds], 1)
    means = block_mean(sorted_keys, Order(perm, front, torch.zeros(count + 1, dtype=torch.int8, device=k.device)))
    return Clusters(Order(perm, bounds, roles, means[:, 1:].contiguous()))


def _nearest(unit: Tensor, centroids: Tensor, padding: Tensor) -> Tensor:
    """int64 [Pk, P]: 1 + the centroid of the largest cosine, 0 for padding."""
    pieces = -(-unit.shape[0] * unit.shape[1] * centroids.shape[1] // PRODUCTS)
    best = [(part @ centroids.mT).argmax(-1) for part in unit.chunk(max(1, pieces), 1)]
    return torch.where(padding, 0, torch.cat(best, 1) + 1)


def key_shares(q: Tensor, clusters: Clusters, scale: float) -> Tensor:
    """S_i = exp(q.C_i) / sum_j N_j exp(q.C_j): the softmax weight that one key of cluster i is expected to get. q [B,
    Hq, n, D] -> float32 [Pk, G * n, C], G = Hq / Hk query heads per key head."""
    rows = q.reshape(clusters.means.shape[0], -1, q.shape[-1]).float()
    logits = rows @ clusters.means.mT * scale
    sizes = clusters.order.sizes.float()[:, None, :]
    logits = logits.masked_fill(sizes == 0, -math.inf)
    return (logits - (logits + sizes.log()).logsumexp(-1, keepdim=True)).exp()


def threshold(share: Tensor, sizes: Tensor, budget: float) -> Tensor:
    """The T for which clusters with S >= T hold `budget` of the keys, over all given queries together (one
    threshold for all heads, so that a head with a peaked distribution reads less). share [Pk, m, C], sizes [Pk, C]."""
    weight = sizes.float()[:, None, :].expand_as(share).reshape(-1)
    order = share.reshape(-1).sort(descending=True)
    taken = weight[order.indices].double().cumsum(0)
    last = torch.searchsorted(taken, (taken[-1:] * budget).contiguous()).clamp(max=len(taken) - 1)
    return order.values[last][0]


class Lookup(Reader):
    """Reads the clusters of the prompt that the new queries are near to, and all that came after the prompt.

    share: of the prompt's keys that queries are to read on average: the threshold is set for it from the last `sample`
    queries of the prompt. cluster: keys per cluster on average. rounds: of k-means, run once per prompt.

    Differences from the paper: its threshold is one for all layers, found ahead of time; here each layer has its own,
    found from the prompt itself. Queries that share a key head (grouped queries, new tokens of a draft) read what any
    of them asks for. The hierarchical look-up is left out. A copy of the prompt's keys and values in the order
    of the clusters is held, for the cache of the host keeps its own order. A cache that is not the prompt's any more
    (cut and grown anew) is read whole. Each call waits for the device once, to see that.
    """

    kind: ClassVar[str] = "lookup"
    share: float = Field(default=0.1, gt=0, le=1)
    cluster: int = Field(default=16, ge=1)
    rounds: int = Field(default=4, ge=0)
    sample: int = Field(default=64, ge=1)

    def start(self) -> ReaderState:
        return _Lookup(self)


class _Lookup(ReaderState):
    def __init__(self, part: Lookup) -> None:
        self.part = part
        self.everything = Everything().start()
        self.clusters: Clusters | None = None
        self.witness: Witness | None = None
        self.k = self.v = torch.empty(0)
        self.limit = torch.empty(0)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> None:
        count = max(1, k.shape[2] // self.part.cluster)
        self.clusters = cluster(k, count, self.part.rounds, first)
        order = self.clusters.order
        self.k, self.v = order.arrange(k), order.arrange(v)
        self.witness = Witness(k, k.shape[2] - 1)
        seen = key_shares(q[:, :, -self.part.sample :], self.clusters, scale)
        limit = threshold(seen, order.sizes, self.part.share)
        self.limit = limit if self.part.share < 1 else torch.zeros_like(limit)  # other queries may care for the rest

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, tree: Tensor | None = None
    ) -> Output:
        prompt = self.k.shape[2] if self.clusters is not None else 0
        known = self.witness is not None and k.shape[2] - q.shape[2] >= prompt and self.witness.knows(k)
        if self.clusters is None or not known:
            self.clusters, self.k, self.v, self.read = None, torch.empty(0), torch.empty(0), None
            return self.everything.attend(q, k, v, first, scale, tree)
        keep = (key_shares(q, self.clusters, scale) >= self.limit).any(1)
        work = select(keep, self.clusters.order.bounds, workers(k.device), places=prompt)
        fixed = decode(q, self.k, self.v, work, scale=scale)
        self.read = work.tokens() + work.rows * (k.shape[2] - prompt)
        after = self.everything.attend(q, k[:, :, prompt:], v[:, :, prompt:], None, scale, tree)
        return Output(*merge([(fixed.o, fixed.lse), (after.o, after.lse)]))

    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))


class ShareAbove(Selector):
    """Keeps the blocks whose keys are each expected to get at least `limit` of a query's softmax mass: the rule of
    Squeezed Attention for any layout and any scorer (of which `Centroid` on k-means is the paper's). At least the
    block whose keys are expected to get most."""

    kind: ClassVar[str] = "share-above"
    limit: float = Field(ge=0, le=1)

    def start(self) -> SelectorState:
        return _ShareAbove(self.limit)


class _ShareAbove(SelectorState):
    def __init__(self, limit: float) -> None:
        self.limit = limit

    def keep(self, scores: Tensor, blocks: Blocks) -> Tensor:
        may = candidates(scores, blocks)
        each = shares(scores, may) / key_sizes(scores, blocks).clamp(min=1)
        best = each.argmax(-1, keepdim=True)
        return ((each >= self.limit).scatter(-1, best, True) & may) | (scores == math.inf)
