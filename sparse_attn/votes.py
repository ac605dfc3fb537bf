"""TokenSelect: all heads vote for tokens, and a choice serves until the query has turned (2411.02886).

Shapes: B batch, Hq, Hk heads, n new queries, S keys, D, Dv head dimensions, T tokens chosen.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.decode import decode, select, workers
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.reader import Everything, Reader, ReaderState, newest


class Votes(Reader):
    """The first `sinks` keys, the last `window`, and the `top` others that the heads vote for.

    A head's vote for a key is its softmax weight among the candidates, so no head outvotes the others by the size of its
    logits; votes are added over the heads (paper, 4.1: "head soft vote") and the new queries, and all heads read the same
    tokens. The choice is used again while cos(q, the query it was made with) >= `similarity`, for all heads together
    (4.2, selection cache); tokens that have come since are read.

    Defaults are the paper's. Differences from the official code: query head h votes with the key head it belongs to,
    h // (Hq / Hk), and logits are scaled by 1/sqrt(D) before the softmax (that code maps heads otherwise, and leaves the
    scale out); in a batch every sample chooses for itself, and the choice is renewed when any sample's query has turned.
    The test of similarity waits for the device once per call; similarity=0 ("never renew") and above 1 ("always") do not.
    """

    kind: ClassVar[str] = "votes"
    top: int = Field(default=2048, ge=1)
    sinks: int = Field(default=128, ge=0)
    window: int = Field(default=512, ge=1)
    similarity: float = Field(default=0.9, ge=0)

    def start(self) -> ReaderState:
        return _Votes(self)


class _Votes(ReaderState):
    def __init__(self, part: Votes) -> None:
        self.part = part
        self.everything = Everything().start()
        self.query: Tensor | None = None  # float32 [B, Hq, D], of the choice
        self.chosen: Tensor | None = None  # int64 [B, T], places, best first; those behind `real` are not candidates
        self.real: Tensor | None = None  # int64 [B]
        self.edge = 0  # places from here on are read, whatever was chosen
        self.made = 0  # choices made so far

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, tree: Tensor | None = None
    ) -> Output:
        part, s, n = self.part, k.shape[2], q.shape[2]
        if s <= part.sinks + part.top + part.window + n:
            self.read = None
            return self.everything.attend(q, k, v, first, scale, tree)
        begin = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device) if first is None else first
        if not self._serves(q, s):
            self.edge = s - part.window - n + 1
            self._choose(q, k, begin, scale)
        assert self.chosen is not None
        near = torch.arange(self.edge, s, device=k.device).expand(k.shape[0], -1)
        sinks = begin[:, None] + torch.arange(part.sinks, device=k.device)
        place = torch.cat([sinks.clamp(max=s - 1), self.chosen, near], 1)[:, None, :, None]
        k, v = (x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
        keep, bounds = self._reads(begin, k.shape[1], k.shape[2])
        work = select(keep, bounds, workers(k.device), places=k.shape[2])
        self.read = work.tokens()
        return decode(q, k, v, work, scale=scale, mask=newest(n, q.device, tree))

    def num_bytes(self) -> int:
        held = (self.query, self.chosen, self.real)
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)

    def _serves(self, q: Tensor, s: int) -> bool:
        """May the last choice be used for q?"""
        if self.query is None or self.query.shape[0] != q.shape[0] or self.part.similarity > 1:
            return False
        if self.edge > s:  # the cache was cropped: places may hold other tokens now
            return False
        if self.part.similarity == 0:
            return True
        cosine = torch.cosine_similarity(self._mean(q).flatten(1), self.query.flatten(1), dim=1)
        return bool(cosine.min() >= self.part.similarity)

    @staticmethod
    def _mean(q: Tensor) -> Tensor:
        return q.float().mean(2)

    def _choose(self, q: Tensor, k: Tensor, begin: Tensor, scale: float) -> None:
        from_, to = begin + self.part.sinks, self.edge
        place = torch.arange(to, device=k.device)
        open_ = place >= from_[:, None]
        votes = ballot(q, k[:, :, :to], open_, scale)
        top = votes.masked_fill(~open_, -1.0).topk(min(self.part.top, to), dim=1)
        self.chosen, self.real = top.indices, (top.values >= 0).sum(1)
        self.query = self._mean(q)
        self.made += 1

    def _reads(self, begin: Tensor, heads: int, places: int) -> tuple[Tensor, Tensor]:
        """keep and bounds over the gathered places: sinks, chosen, near, of each only what the sample really has."""
        assert self.chosen is not None and self.real is not None
        sinks, top = self.part.sinks, self.chosen.shape[1]
        own = (self.edge - begin).clamp(0, sinks)
        late = (begin - self.edge).clamp(min=0)
        zero = torch.zeros_like(own)
        bounds = torch.stack([zero, own, zero + sinks, sinks + self.real, sinks + top + late, zero + places], 1)
        keep = torch.tensor([True, False, True, False, True], device=begin.device)
        return keep.expand(len(begin) * heads, -1), bounds.repeat_interleave(heads, 0)


def ballot(q: Tensor, k: Tensor, candidates: Tensor, scale: float) -> Tensor:
    """Votes for each key: float32 [B, S] from q [B, Hq, n, D], k [B, Hk, S, D], candidates bool [B, S]."""
    b, hq, n, d = q.shape
    hk, s = k.shape[1], k.shape[2]
    logits = q.reshape(b, hk, hq // hk * n, d).float() @ k.float().mT * scale
    logits = logits.masked_fill(~candidates[:, None, None, :], -math.inf)
    return logits.softmax(-1).nan_to_num(0.0).view(b, -1, s).sum(1)
