"""TokenSelect: all heads vote for tokens, and a choice serves until the query has turned (2411.02886).

Shapes: B batch, Hq, Hk heads, n new queries, S keys, D, Dv head dimensions, T tokens chosen (sinks among them).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.text.decode import Work, decode, select, workers
from hasten.sparse_attn.text.reader import Everything, Reader, ReaderState, Witness


class Votes(Reader):
    """The first `sinks` keys, the last `window`, and the `top` others that the heads vote for.

    A head's vote for a key is its softmax weight among the candidates, so no head outvotes the others by the size of
    its logits; votes are added over the heads (the paper's soft vote) and the new queries, and all heads read
    the same tokens. The choice is used again while cos(q, the query it was made with) >= `similarity`, for all heads
    together (its selection cache); tokens that have come since are read.

    Defaults are the paper's. Differences from the official code: query head h votes with the key head it belongs to,
    h // (Hq / Hk), and logits are scaled by 1/sqrt(D) before the softmax (that code maps heads otherwise, and leaves
    the scale out); in a batch every sample chooses for itself, and the choice is renewed when any sample's query has
    turned. similarity=0 never renews a choice for the query's sake, above 1 always does. Each call waits for the
    device once or twice (is it the same cache, has the query turned?). The chosen keys and values are copied once per
    choice.
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
        self.made = 0  # choices made so far
        self.edge = 0  # places from here on are read, whatever was chosen
        self.query = self.k = self.v = torch.empty(0)  # of the choice: mean query, and the keys and values chosen
        self._work: Work | None = None  # which of them each sample really has
        self.witness: Witness | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, tree: Tensor | None = None
    ) -> Output:
        part, s, n = self.part, k.shape[2], q.shape[2]
        if s <= part.sinks + part.top + part.window + n:
            self.read = None
            return self.everything.attend(q, k, v, first, scale, tree)
        begin = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device) if first is None else first
        if not self._serves(q, k):
            self._choose(q, k, v, begin, scale)
        assert self._work is not None
        chosen = decode(q, self.k, self.v, self._work, scale=scale)
        late = None if first is None else (first - self.edge).clamp(min=0)
        near = self.everything.attend(q, k[:, :, self.edge :], v[:, :, self.edge :], late, scale, tree)
        self.read = self._work.tokens() + self._near(begin, s) * k.shape[1]
        return Output(*merge([(chosen.o, chosen.lse), (near.o, near.lse)]))

    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.query, self.k, self.v))

    def _near(self, begin: Tensor, s: int) -> Tensor:
        return (s - begin.clamp(min=self.edge)).sum()

    def _serves(self, q: Tensor, k: Tensor) -> bool:
        """May the last choice be used for q? Not after its cache has become another one."""
        if self.witness is None or self.part.similarity > 1 or not self.witness.knows(k):
            return False
        if self.part.similarity == 0:
            return True
        cosine = torch.cosine_similarity(_mean(q).flatten(1), self.query.flatten(1), dim=1)
        return bool(cosine.min() >= self.part.similarity)

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, begin: Tensor, scale: float) -> None:
        sinks, self.edge = self.part.sinks, k.shape[2] - self.part.window - q.shape[2] + 1
        place = torch.arange(self.edge, device=k.device)
        open_ = place >= (begin + sinks)[:, None]
        votes = ballot(q, k[:, :, : self.edge], open_, scale)
        top = votes.masked_fill(~open_, -1.0).topk(min(self.part.top, self.edge), dim=1)
        first = (begin[:, None] + torch.arange(sinks, device=k.device)).clamp(max=self.edge - 1)
        chosen = torch.cat([first, top.indices], 1)
        self.k, self.v = (_taken(x, chosen) for x in (k, v))
        own = (self.edge - begin).clamp(0, sinks)  # short samples have fewer sinks, and fewer candidates than `top`
        real = (top.values >= 0).sum(1)
        zero = torch.zeros_like(own)
        bounds = torch.stack([zero, own, zero + sinks, sinks + real, zero + chosen.shape[1]], 1)
        keep = torch.tensor([True, False, True, False], device=k.device).expand(len(begin) * k.shape[1], -1)
        bounds = bounds.repeat_interleave(k.shape[1], 0)
        self._work = select(keep, bounds, workers(k.device), places=chosen.shape[1])
        self.query, self.witness, self.made = _mean(q), Witness(k, self.edge - 1), self.made + 1


def _mean(q: Tensor) -> Tensor:
    return q.float().mean(2)


def _taken(x: Tensor, place: Tensor) -> Tensor:
    """x [B, H, S, D] at places int64 [B, T]: [B, H, T, D]; whole rows are copied, several times faster than
    `gather`."""
    return torch.stack([one.index_select(1, at) for one, at in zip(x, place, strict=True)])


def ballot(q: Tensor, k: Tensor, candidates: Tensor, scale: float) -> Tensor:
    """Votes for each key: float32 [B, S] from q [B, Hq, n, D], k [B, Hk, S, D], candidates bool [B, S]."""
    b, hq, n, d = q.shape
    hk, s = k.shape[1], k.shape[2]
    logits = q.reshape(b, hk, hq // hk * n, d).float() @ k.float().mT * scale
    logits = logits.masked_fill(~candidates[:, None, None, :], -math.inf)
    return logits.softmax(-1).nan_to_num(0.0).view(b, -1, s).sum(1)
