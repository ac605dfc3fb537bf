"""HiP: the best key blocks found by halving, in O(n log n) (2406.09827). Written from the paper alone.

Shapes: see `hasten.sparse_attn.blocks`; Q query blocks, K top blocks.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.blocks import NEVER, Order, grouped
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.scorers.scorer import Scorer, ScorerState, View, readable
from hasten.sparse_attn.text.decode import Work, select, workers
from hasten.sparse_attn.text.reader import Everything, Reader, ReaderState


def halve(q: Tensor, representatives: Tensor, low: Tensor, high: Tensor, top: int, most: int) -> tuple[Tensor, Tensor]:
    """The `top` blocks of largest q.k among those from low to high, found by halving ranges of blocks.

    q: float32 [P, Q, M, D], M queries that stand for each query block. representatives: float32 [1 or P, C, D], one key
    per block. low, high: int64 [1 or P, Q], the range searched. most: largest range (high - low), as a number.
    Returns blocks int64 [P, Q, top] and their scores float32 (-inf: the range held fewer).

    2 * top equal ranges; the `top` of them whose middle block scores highest (the sum over M of the exponentials, so
    that one query's find counts) are cut in two; and so on until each holds one block: log2(most / top) rounds, each
    of 2 * top products per query.
    """
    planes, rows = q.shape[0], q.shape[1]
    low, high = low.expand(planes, rows), high.expand(planes, rows)
    representatives = representatives.expand(planes, -1, -1)  # one plane where all query heads share one head of keys
    cuts = torch.arange(2 * top + 1, device=q.device)
    edges = low[..., None] + (high - low)[..., None] * cuts // (2 * top)
    start, end = edges[..., :-1], edges[..., 1:]
    rounds = max(0, math.ceil(math.log2(max(1.0, most / (2 * top))))) + 1
    for number in range(rounds):
        score = _score(q, representatives, start, end)
        best = score.topk(top, dim=-1)
        start, end = start.gather(-1, best.indices), end.gather(-1, best.indices)
        if number < rounds - 1:
            middle = (start + end + 1) // 2
            start, end = torch.cat([start, middle], -1), torch.cat([middle, end], -1)
    return start.clamp(0, representatives.shape[1] - 1), best.values


def _score(q: Tensor, representatives: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Score of each range by its middle block: float32 [P, Q, N], -inf for empty ranges."""
    count, d = representatives.shape[1:]
    middle = ((start + end - 1) // 2).clamp(0, count - 1)
    keys = representatives.gather(1, middle.flatten(1)[..., None].expand(-1, -1, d)).view(*middle.shape, d)
    score = (q @ keys.mT).logsumexp(2)
    return score.masked_fill(end <= start, -math.inf)


class Hierarchical(Scorer):
    """Scores the `top` key blocks that halving finds for each query block; all others are -inf (never read).

    With the selector that keeps everything finite this is HiP's prefill. queries: evenly spaced queries that stand
    for a query block. A key block is represented by its middle key. Under a causal mask the search ends at the query
    block. Differences from the paper: the search ends at blocks (what the plan reads), not at keys; a range is
    represented by the middle key of its middle block, not of the range (no better where that was tried).
    """

    kind: ClassVar[str] = "hierarchical"
    top: int = Field(default=16, ge=1)
    queries: int = Field(default=4, ge=1)

    def start(self) -> ScorerState:
        return _Hierarchical(self.top, self.queries)


class _Hierarchical(ScorerState):
    def __init__(self, top: int, queries: int) -> None:
        self.top, self.queries = top, queries

    def scores(self, view: View) -> Tensor:
        b, hq, _, _ = view.q.shape
        orders = view.blocks
        padding = (orders.k.roles == NEVER)[:, None]
        keys = grouped(middles(view.k, orders.k).masked_fill_(padding, 0), view.groups) * view.scale
        rows = samples(view.q, orders.q, self.queries)
        count = orders.k.count
        low = torch.zeros(1, orders.q.count, dtype=torch.int64, device=keys.device)
        high = torch.full_like(low, count)
        mask = view.mask
        if mask is not None and mask.right is not None and orders.q.perm is None and orders.k.perm is None:
            last = orders.q.bounds[:, 1:].long() - 1 + mask.offset + mask.right
            first = orders.k.bounds[:, :-1].long()
            if first.shape[0] > 1 or last.shape[0] > 1:
                first = grouped(first, view.groups).expand(b * hq, -1)
                last = last.expand(b * hq, -1)
            high = torch.searchsorted(first.contiguous(), last.contiguous(), right=True)
        block, score = halve(rows, keys, low, high, min(self.top, count), count)
        found = keys.new_full((b * hq, orders.q.count, count), -math.inf)
        # Ranges that ran empty name some block too; the larger of two scores for it stands.
        return readable(found.scatter_reduce_(2, block, score, "amax"), view)


def middles(x: Tensor, order: Order) -> Tensor:
    """The token in the middle of each block of arranged x [B, H, S, D]: float32 [B * H, C, D]."""
    planes, s, d = x.shape[0] * x.shape[1], x.shape[2], x.shape[3]
    bounds = order.bounds.long().expand(planes, -1)
    place = ((bounds[:, :-1] + bounds[:, 1:] - 1) // 2).clamp(0, s - 1)
    return x.reshape(planes, s, d).gather(1, place[..., None].expand(-1, -1, d)).float()


def samples(x: Tensor, order: Order, count: int) -> Tensor:
    """`count` evenly spaced tokens of each block of arranged x [B, H, S, D]: float32 [B * H, C, count, D]."""
    planes, s, d = x.shape[0] * x.shape[1], x.shape[2], x.shape[3]
    bounds = order.bounds.long().expand(planes, -1)
    sizes = bounds[:, 1:] - bounds[:, :-1]
    steps = 2 * torch.arange(count, device=x.device) + 1
    place = bounds[:, :-1, None] + sizes[..., None] * steps // (2 * count)
    place = torch.minimum(place, (bounds[:, 1:, None] - 1)).clamp(0, s - 1)
    flat = x.reshape(planes, s, d).gather(1, place.flatten(1)[..., None].expand(-1, -1, d))
    return flat.view(planes, order.count, count, d).float()


class Tree(Reader):
    """HiP's decoding: the `top` blocks of `block` keys that halving finds, the first `sinks` keys and the last
    `window`.

    The search is made anew every `refresh` tokens (the paper's implementation: 8). All new queries and all heads of
    one key head search together.
    """

    kind: ClassVar[str] = "tree"
    top: int = Field(default=64, ge=1)
    block: int = Field(default=32, ge=1)
    sinks: int = Field(default=128, ge=0)
    window: int = Field(default=512, ge=1)
    refresh: int = Field(default=8, ge=1)

    def start(self) -> ReaderState:
        return _Tree(self)


class _Tree(ReaderState):
    def __init__(self, part: Tree) -> None:
        self.part = part
        self.everything = Everything().start()
        self.keep: Tensor | None = None  # bool [R, C] over the blocks before `edge`
        self.edge = 0
        self.made = 0  # length of the cache when the choice was made

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, tree: Tensor | None = None
    ) -> Output:
        part = self.part
        if k.shape[2] <= part.top * part.block + part.sinks + part.window + q.shape[2]:
            self.read = None
            return self.everything.attend(q, k, v, first, scale, tree)
        return super().attend(q, k, v, first, scale, tree)

    def work(self, q: Tensor, k: Tensor, first: Tensor | None, scale: float) -> Work:
        b, hk, s, _ = k.shape
        part = self.part
        begin = torch.zeros(b, dtype=torch.int64, device=k.device) if first is None else first
        begin = begin.repeat_interleave(hk)[:, None]
        stale = self.keep is None or self.keep.shape[0] != b * hk or not 0 <= s - self.made < part.refresh
        if stale:
            self._search(q, k, begin, scale)
        assert self.keep is not None
        blocks = torch.arange(0, self.edge + 1, part.block, device=k.device)
        sinks = (begin + part.sinks).clamp(max=self.edge)
        # Blocks of the search between the sinks and the edge; before and behind them what is always read.
        found = torch.maximum(blocks.expand(b * hk, -1), sinks)
        near = torch.maximum(begin, torch.full_like(begin, self.edge))
        bounds = torch.cat([torch.minimum(begin, sinks), found, near, torch.full_like(begin, s)], 1)
        yes, no = (torch.full((b * hk, 1), flag, device=k.device) for flag in (True, False))
        return select(torch.cat([yes, self.keep, no, yes], 1), bounds, workers(k.device), places=s)

    def _search(self, q: Tensor, k: Tensor, begin: Tensor, scale: float) -> None:
        b, hk, s, d = k.shape
        part = self.part
        count = (s - q.shape[2] + 1 - part.window) // part.block
        self.edge, self.made = count * part.block, s
        keys = k[:, :, part.block // 2 : self.edge : part.block].reshape(b * hk, count, d).float() * scale
        rows = q.reshape(b * hk, 1, -1, d).float()
        low = ((begin + part.sinks) // part.block).clamp(max=count)
        block, score = halve(rows, keys, low, torch.full_like(low, count), min(part.top, count), count)
        found = torch.zeros(b * hk, count, device=k.device)
        self.keep = found.scatter_reduce_(1, block[:, 0], (score[:, 0] > -math.inf).float(), "amax") > 0

    def num_bytes(self) -> int:
        return self.keep.numel() if self.keep is not None else 0
