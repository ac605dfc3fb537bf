"""Queries and keys in common clusters: block i of both sides holds what belongs to centroid i.

Shapes: see `hasten.sparse_attn.blocks`; n tokens of one segment, C clusters.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from hasten.sparse_attn.blocks import Blocks
from hasten.sparse_attn.layouts.kmeans import KMeans, lloyd, runs, two_steps
from hasten.sparse_attn.layouts.layout import Arrangement, Layout, LayoutState
from hasten.sparse_attn.segments import Segment, Tokens


class Common(Layout):
    """Common clusters of the directions of queries and keys, learned online (Routing Transformer, Roy et al. 2021, 4.1).

    With the scorer block-diagonal, each query reads the keys of its own cluster. size: tokens per cluster on average.
    first, warm: passes at the first call of a run and at later ones, which begin with the clusters of the one before.

    The paper learns centroids while the model trains, by a moving average, and takes the nearest w tokens of each, so
    that clusters are equal and a token may be in none or several. Here they follow the tokens at hand, every token is
    in one, and clusters differ in size. With grouped queries the query heads of a group and their key head share
    centroids.
    """

    kind: ClassVar[str] = "common"
    size: float = Field(default=256, ge=1)
    first: int = Field(default=10, ge=1)
    warm: int = Field(default=2, ge=1)
    seed: int = 0

    def start(self) -> LayoutState:
        return _Common(self)


class _Common(LayoutState):
    def __init__(self, part: Common) -> None:
        self.part = part
        self._centroids: Tensor | None = None

    def blocks(self, q: Tensor, k: Tensor, q_tokens: Tokens, k_tokens: Tokens) -> Blocks:
        self._learn(q, k)
        return super().blocks(q, k, q_tokens, k_tokens)

    def arrange(self, x: Tensor, segment: Segment, side: str) -> Arrangement:
        assert self._centroids is not None
        b, h, n, d = x.shape
        centroids = self._centroids.repeat_interleave(b * h // self._centroids.shape[0], 0)
        to_nearest, _ = two_steps(x)
        labels = to_nearest(normalize(x.float(), dim=-1).reshape(b * h, n, d), centroids)
        return Arrangement(*runs(labels, centroids.shape[1]))

    def num_bytes(self) -> int:
        """Bytes held for later steps."""
        return self._centroids.numel() * self._centroids.element_size() if self._centroids is not None else 0

    def _learn(self, q: Tensor, k: Tensor) -> None:
        b, hk, sk, d = k.shape
        queries = q.reshape(b * hk, -1, d)
        points = normalize(torch.cat([queries, k.reshape(b * hk, sk, d)], 1).float(), dim=-1)
        count = min(sk, max(1, round(sk / self.part.size)))
        old = self._centroids
        warm = old is not None and old.shape == (b * hk, count, d) and old.device == k.device
        if not warm:
            old = KMeans(seed=self.part.seed).begin(points, count)
        assert old is not None
        _, means, _ = lloyd(points, old, self.part.warm if warm else self.part.first)
        self._centroids = normalize(means, dim=-1)
