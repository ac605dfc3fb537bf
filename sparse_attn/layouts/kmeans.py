"""K-means: tokens that look alike stand together, head by head; clusters go on from one step to the next.

Shapes: see `hasten.sparse_attn.blocks`; n tokens of one segment, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from hasten.sparse_attn.backends.choice import HALF, WIDEST, installed
from hasten.sparse_attn.layouts.layout import Arrangement, Layout, LayoutState
from hasten.sparse_attn.layouts.tree import balanced, portions
from hasten.sparse_attn.segments import Segment

ROOM = {"cpu": 1 << 18}
"""Distances that are in memory at once: 1 MB, which a core's cache holds; on devices without the kernels, `WIDE`."""

WIDE = 1 << 24

LEAF = 64
"""Tokens per leaf of the tree that the first clusters begin with, at most. Fewer are faster and begin worse."""

STRIDE = 40503
"""2^16 over the golden ratio: multiples of it, modulo 2^16, are spread evenly."""

Metric = Literal["euclidean", "cosine"]


class KMeans(Layout):
    """Clusters of queries and of keys, found for each head on what attention multiplies, after rotary embedding
    (SVG2, arXiv 2505.18875, section 4.1).

    q_size, k_size: tokens per cluster on average; q_clusters, k_clusters: numbers of clusters instead (SVG2: 300 and 1000
    for 75,600 tokens of Wan 720p, which are 252 and 76 tokens). Never more clusters than tokens.
    first, warm: passes of Lloyd's algorithm at the first call of a run, and at later ones, which begin with the clusters
    of the one before (SVG2: 50 and 2). Their number is fixed: nothing is read from the device.
    init: where the first call begins. "tree": the leaves of a balanced tree (see `hasten.sparse_attn.layouts.tree`) over up to 64 tokens per
    cluster, spread over the sequence; similar clusters are neighbours then, so that what is read is fewer, longer ranges.
    "random": any C tokens, as SVG2. Both by `seed`, the same for all heads.
    sample: all passes of a call but the last look at one in `sample` tokens, each pass at others.
    metric: "cosine" clusters directions (Squeezed attention, arXiv 2411.09688, section 3.1); means are of the vectors as
    they are, so long ones count for more.
    outliers: share of the keys, those with the lowest cosine to their cluster's mean, that every query reads (ShadowKV,
    arXiv 2410.21465, section 4.1, sets whole chunks of 8 tokens aside; here it is single tokens).

    Clusters have any size, and may be empty: those keep their place and wait for tokens. Unlike the official code, the
    state belongs to one run, branch and site, every `start()` begins anew, and there may be any number of samples.
    """

    kind: ClassVar[str] = "kmeans"
    q_size: float = Field(252, ge=1)
    k_size: float = Field(76, ge=1)
    q_clusters: int | None = Field(None, ge=1)
    k_clusters: int | None = Field(None, ge=1)
    first: int = Field(3, ge=1)
    warm: int = Field(2, ge=1)
    init: Literal["tree", "random"] = "tree"
    seed: int = 0
    sample: int = Field(4, ge=1)
    metric: Metric = "euclidean"
    outliers: float = Field(0.0, ge=0, lt=1)

    def clusters(self, tokens: int, side: str) -> int:
        """C for n tokens of "q" or "k"."""
        number, size = (self.q_clusters, self.q_size) if side == "q" else (self.k_clusters, self.k_size)
        return min(tokens, number if number is not None else max(1, round(tokens / size)))

    def begin(self, x: Tensor, clusters: int) -> Tensor:
        """The means that the first call begins with: float32 [P, C, D] for x [P, n, D]."""
        n = x.shape[1]
        if self.init == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return x[:, torch.randperm(n, generator=generator)[:clusters].to(x.device)].float()
        each = min(LEAF, n // clusters)
        number = torch.arange(clusters * each + 1, device=x.device)
        edges = number * n // (clusters * each)
        share = (number[:-1] + self.seed) * STRIDE % 2**16  # within each stretch at another place, or columns would repeat
        chosen, found = edges[:-1] + (edges.diff() * share >> 16), []
        for part in portions(x):
            some = part[:, chosen].float()
            leaves = some.gather(1, balanced(some, each)[..., None].expand_as(some))
            found.append(leaves.view(-1, clusters, each, x.shape[2]).mean(2))
        return torch.cat(found)

    def start(self) -> LayoutState:
        return _KMeans(self)


class _KMeans(LayoutState):
    def __init__(self, part: KMeans) -> None:
        self.part = part
        self._last: dict[tuple[str, str], tuple[int, Tensor]] = {}  # tokens and centroids of the call before

    def arrange(self, x: Tensor, segment: Segment, side: str) -> Arrangement:
        b, h, n, d = x.shape
        points, part = x.reshape(b * h, n, d), self.part
        count = part.clusters(n, side)
        tokens, old = self._last.get((side, segment.name), (0, x))
        warm = tokens == n and old.shape == (b * h, count, d) and old.device == x.device
        if not warm:
            old = part.begin(points, count)
        labels, centroids, sizes = lloyd(points, old, part.warm if warm else part.first, part.metric, min(part.sample, n))
        self._last[side, segment.name] = n, centroids
        apart = round(part.outliers * n) if side == "k" else 0
        if not apart:
            return Arrangement(*runs(labels, count), means=centroids.masked_fill(sizes[..., None] == 0, 0.0))
        labels = set_apart(points, labels, centroids, apart)
        _, to_means = two_steps(x)
        means, _ = to_means(points, labels, count + 1, centroids.new_zeros(b * h, count + 1, d))
        always = torch.arange(count + 1, device=x.device) == count
        return Arrangement(*runs(labels, count + 1), means=means, always=always)

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self._last.values())


def lloyd(
    x: Tensor, centroids: Tensor, passes: int, metric: Metric = "euclidean", sample: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [P, n], means float32 [P, C, D] of what they name (an empty cluster's: as before), sizes [P, C].

    x: [P, n, D] in any floating dtype, centroids: [P, C, D]. On a CPU one plane after the other, which stays in its cache
    (and does not depend on the others, bit by bit).
    """
    to_nearest, to_means = two_steps(x)
    found = []
    at_once = 1 if x.device.type == "cpu" else x.shape[0]
    for first in range(0, x.shape[0], at_once):
        part, old = x[first : first + at_once], centroids[first : first + at_once]
        for number in range(passes):
            seen = part[:, number % sample :: sample] if number < passes - 1 else part
            labels = to_nearest(seen, normalize(old, dim=-1) if metric == "cosine" else old)
            old, sizes = to_means(seen, labels, old.shape[1], old)
        found.append((labels, old, sizes))
    labels, means, sizes = (torch.cat(each) for each in zip(*found, strict=True))
    return labels, means, sizes


Assign = Callable[[Tensor, Tensor], Tensor]
Update = Callable[[Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor]]


def two_steps(x: Tensor) -> tuple[Assign, Update]:
    """Lloyd's two steps for the device and dtype of x: the kernels where they run, else those below."""
    if x.is_cuda and x.dtype in (*HALF, torch.float32) and x.shape[-1] <= WIDEST and installed("triton"):
        from hasten.sparse_attn.kernels import kmeans

        return kmeans.assign, kmeans.update
    return assign, update


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each token: int64 [P, n] for x [P, n, D] and centroids [P, C, D].

    Of equal distances the lowest index wins. Centroids enter as steps e from their mean m, as arg min of
    |e|^2 + 2 m.e - 2 x.e: the large offset that keys of trained models share would take digits.
    """
    planes, n, _ = x.shape
    middle = centroids.mean(1, keepdim=True)
    e = centroids - middle
    norm = (e.square() + 2 * e * middle).sum(-1)[:, None]
    labels = torch.empty(planes, n, dtype=torch.int64, device=x.device)
    at_once = max(1, ROOM.get(x.device.type, WIDE) // (planes * centroids.shape[1]))
    for first in range(0, n, at_once):
        distances = torch.baddbmm(norm, x[:, first : first + at_once].float(), e.mT, alpha=-2)
        torch.argmin(distances, -1, out=labels[:, first : first + at_once])
    return labels


def update(x: Tensor, labels: Tensor, count: int, old: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each cluster, float32 [P, C, D], and its number of tokens, int32 [P, C].

    x: [P, n, D], labels: int [P, n], old: [P, C, D], kept by clusters that have no tokens, and by those whose mean is not
    finite: one bad call leaves no trace in later ones.
    """
    planes, d = x.shape[0], x.shape[2]
    flat = (labels + torch.arange(planes, device=x.device)[:, None] * count).flatten()
    sums = torch.zeros(planes * count, d, device=x.device).index_add_(0, flat, x.reshape(-1, d).float())
    sizes = torch.zeros(planes * count, device=x.device).index_add_(0, flat, torch.ones(1, device=x.device).expand(flat.shape))
    found = (sums / sizes[:, None]).view(planes, count, d)
    return torch.where(found.isfinite(), found, old), sizes.view(planes, count).int()


def runs(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by label, those of one cluster in their own order: perm int64 [P, n] and bounds int32 [P, C + 1]."""
    keys = labels.to(torch.int16) if count < 2**15 else labels  # sorting short keys takes fewer passes
    found, perm = keys.sort(stable=True, dim=-1)
    edges = torch.arange(count + 1, device=labels.device, dtype=found.dtype).expand(labels.shape[0], -1)
    return perm, torch.searchsorted(found, edges.contiguous(), out_int32=True)


def set_apart(x: Tensor, labels: Tensor, centroids: Tensor, number: int) -> Tensor:
    """Labels in which the `number` tokens of each plane that point least along their centroid have label C."""
    found = []
    for points, own, means in zip(x, labels, centroids, strict=True):
        cosine = (normalize(points.float(), dim=-1) * normalize(means, dim=-1)[own.long()]).sum(-1)
        found.append(cosine.nan_to_num(-2.0).topk(number, largest=False).indices)
    return labels.scatter(1, torch.stack(found), centroids.shape[1])
