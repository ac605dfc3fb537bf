"""Delta approximation: far keys that hardly differ from the one before them count as one (DeltaLLM, 2507.19608).

Shapes: B batch, Hq, Hk heads, Pk = B * Hk planes, n new queries, S keys, C runs, D, Dv head dimensions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.blocks import Order, block_mean, uniform
from hasten.sparse_attn.layouts.layout import Arrangement, Layout, LayoutState
from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.segments import Segment
from hasten.sparse_attn.text.exact import exact
from hasten.sparse_attn.text.reader import Everything, Reader, ReaderState, Witness


def runs(k: Tensor, count: int, limit: float = 0.0, first: Tensor | None = None) -> Tensor:
    """Bounds of runs of neighbouring keys of k [B, Hk, S, D] that are nearly alike: int32 [Pk, C + 1], C = `count`.

    The changes |k_t - k_(t-1)| are added up along the sequence, and a new run begins wherever the sum passes a
    multiple of theta: so no two keys of a run are further apart than theta. theta is `limit` times the root mean
    square length of the plane's keys, or more where that takes to get along with C runs (an equal share of all change
    for each). first: int64 [B], padding before it belongs to no run.
    """
    b, hk, s, d = k.shape
    keys = k.reshape(b * hk, s, d).float()
    change = torch.nn.functional.pad((keys[:, 1:] - keys[:, :-1]).norm(dim=-1), (1, 0))
    begin = torch.zeros(b * hk, 1, dtype=torch.int64, device=k.device)
    if first is not None:
        begin = first.repeat_interleave(hk)[:, None]
        change = change.masked_fill(torch.arange(s, device=k.device) <= begin, 0.0)
    total = change.double().cumsum(1)  # float32 sums lose whole runs on long sequences
    size = keys.square().sum(-1).mean(-1, keepdim=True).sqrt()
    theta = torch.maximum(size.double() * limit, total[:, -1:] / count).clamp(min=1e-30)
    number = (total / theta).floor().clamp(max=count - 1)
    numbers = torch.arange(count, device=k.device).double().expand(b * hk, -1).contiguous()
    ends = torch.searchsorted(number, numbers, right=True)
    return torch.cat([begin, torch.maximum(ends, begin)], 1).int()


class Runs(Layout):
    """Blocks are the runs of `runs`: tokens keep their order, blocks differ in length. With compensation of first
    order and a selection of what is near, this is DeltaLLM's prefill.

    share: runs per token. limit: see `runs`; 0 takes as many runs as `share` allows. Queries are cut into blocks of
    `block`.
    """

    kind: ClassVar[str] = "runs"
    share: float = Field(default=0.25, gt=0, le=1)
    limit: float = Field(default=0.0, ge=0)
    block: int = Field(default=64, ge=1)

    def start(self) -> LayoutState:
        return _Runs(self)


class _Runs(LayoutState):
    def __init__(self, part: Runs) -> None:
        self.part = part

    def arrange(self, x: Tensor, segment: Segment, side: str) -> Arrangement:
        if side == "q":
            return Arrangement(None, uniform(segment.length, self.part.block, x.device))
        return Arrangement(None, runs(x, max(1, round(segment.length * self.part.share)), self.part.limit))


class Delta(Reader):
    """The last `window` keys exactly; of those before, each run of nearly equal keys as one key with the mean value.

    share: runs per far key. limit: see `runs`. sinks: first keys, read exactly. refresh: tokens after which runs are
    made anew (those that come between are near, and exact). Each call waits for the device once, to see that the
    cache is still the one that runs were made of.

    DeltaLLM keeps, for every coordinate of a key, the last value unless it has changed by more than a threshold, and
    saves the products of coordinates that stayed; that needs hardware which skips zeros. Here a whole key stays or not,
    which any hardware gains from. Two further differences: a run is represented by its mean, not its first key, and the
    values of a run are averaged, weighted alike, which is exact where its keys are equal.
    """

    kind: ClassVar[str] = "delta"
    share: float = Field(default=0.25, gt=0, le=1)
    limit: float = Field(default=0.0, ge=0)
    window: int = Field(default=256, ge=1)
    sinks: int = Field(default=4, ge=0)
    refresh: int = Field(default=64, ge=1)

    def start(self) -> ReaderState:
        return _Delta(self)


class _Delta(ReaderState):
    def __init__(self, part: Delta) -> None:
        self.part = part
        self.everything = Everything().start()
        self.k = self.v = self.bias = torch.empty(0)
        self.edge = self.made = 0
        self.witness: Witness | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, tree: Tensor | None = None
    ) -> Output:
        part, s, n = self.part, k.shape[2], q.shape[2]
        if first is not None or s <= part.sinks + part.window + n + 1:
            self.read = None
            return self.everything.attend(q, k, v, first, scale, tree)
        if self.witness is None or not 0 <= s - self.made < part.refresh or not self.witness.knows(k):
            self._summarise(k, v, s, n)
        near = self.everything.attend(q, k[:, :, self.edge :], v[:, :, self.edge :], None, scale, tree)
        parts = [(near.o, near.lse)]
        if part.sinks:
            sinks = exact(q, k[:, :, : part.sinks], v[:, :, : part.sinks], scale)
            parts.append((sinks.o, sinks.lse))
        # log n as one more coordinate of the keys: logits scale * (q.k + 1 * log n / scale)
        asked = torch.cat([q.float(), torch.ones_like(q[..., :1], dtype=torch.float32)], -1)
        far = exact(asked, torch.cat([self.k, self.bias / scale], -1), self.v, scale)
        parts.append((far.o.to(q.dtype), far.lse))
        rows = k.shape[0] * k.shape[1]
        self.read = torch.full((), rows * (s - self.edge + part.sinks + self.k.shape[2]), device=k.device)
        return Output(*merge(parts))

    def _summarise(self, k: Tensor, v: Tensor, s: int, n: int) -> None:
        b, hk, d = k.shape[0], k.shape[1], k.shape[3]
        self.edge, self.made = s - n + 1 - self.part.window, s
        self.witness = Witness(k, self.edge - 1)
        far_k, far_v = (x[:, :, self.part.sinks : self.edge] for x in (k, v))
        count = max(1, round(far_k.shape[2] * self.part.share))
        bounds = runs(far_k, count, self.part.limit)
        order = Order(None, bounds, torch.zeros(count, dtype=torch.int8, device=k.device), tokens=far_k.shape[2])
        self.k = block_mean(far_k, order).view(b, hk, count, d)
        self.v = block_mean(far_v, order).view(b, hk, count, -1)
        # An empty run gets a logit that no exponential tells from none; -inf would be NaN in a product with 0.
        self.bias = order.sizes.float().log().clamp(min=-1e4).view(b, hk, count, 1)

    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.bias))
