"""Readers: which keys of a cache the newest queries read. The family, and the two that look at nothing.

Shapes: B batch, Hq, Hk heads, n new queries, S keys (the last n are those of the new queries), P keys of the prompt,
D, Dv head dimensions, R = B * Hk rows.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.part import Part
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.text.decode import Work, decode, select, whole, workers
from hasten.sparse_attn.text.exact import exact


class Reader(Part):
    """Base of the readers. `start()` gives the state of one sequence (or batch of them) and attention site."""

    @abstractmethod
    def start(self) -> ReaderState:
        """Fresh state."""


class ReaderState:
    """State of a reader; the simplest ones override `work` alone.

    read: places read in the last call, over all R rows (a scalar tensor that nobody has waited for); None: all.
    """

    read: Tensor | None = None

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> None:
        """The prompt has been read: its queries q [B, Hq, P, D] and what the cache holds of it, k [B, Hk, P, D], v.
        first: as in `attend`."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, tree: Tensor | None = None
    ) -> Output:
        """Attention of q [B, Hq, n, D] over k [B, Hk, S, D], v [B, Hk, S, Dv].

        first: int64 [B], places before it are padding; None: there is none. tree: bool [n, n], which of the new tokens
        each new query reads (a draft); None: causal.
        """
        work = self.work(q, k, first, scale)
        self.read = work.tokens()
        return decode(q, k, v, work, scale=scale, mask=newest(q.shape[2], q.device, tree))

    def work(self, q: Tensor, k: Tensor, first: Tensor | None, scale: float) -> Work:
        """What is read of k, the new keys included."""
        raise NotImplementedError

    def places(self, q: Tensor, keys: int, first: Tensor | None, scale: float) -> Tensor | None:
        """Which of the first `keys` places q [B, Hq, n, D] reads, by what `prepare` noted alone, for caches whose keys cost
        something to look at: int64 [B, Hk, m], ascending, -1 for none (with `first` alone). What comes after is read in any
        case. None where a reader has to see keys."""
        return None

    def rows(self, index: Tensor) -> None:
        """The rows changed places, int64 [m]; for those who answer `places`. Others notice by their `Witness`."""

    def num_bytes(self) -> int:
        """Bytes held between tokens."""
        return 0


class Witness:
    """One place of a cache, by which copies made from what lies before it are known to be still those of this cache.

    Beams change rows with each other, drafts and users cut caches and let them grow anew: then keys differ there.
    """

    def __init__(self, k: Tensor, place: int) -> None:
        self.place, self.keys = place, k[:, :, place].clone()

    def knows(self, k: Tensor) -> bool:
        """Is it the same cache, as far as this place tells? Waits for the device."""
        if k.shape[2] <= self.place or k.shape[:2] != self.keys.shape[:2]:
            return False
        return torch.equal(k[:, :, self.place], self.keys)


def newest(n: int, device: torch.device, tree: Tensor | None = None) -> Mask | None:
    """The mask of n new queries: all earlier keys, and of the last n those of `tree` (None: causal)."""
    if tree is None:
        if n == 1:
            return None
        tree = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return Mask(left=None, right=None, tree=tree)


class Everything(Reader):
    """All keys: dense decoding, each key read once for all query heads and new queries that share it."""

    kind: ClassVar[str] = "everything"

    def start(self) -> ReaderState:
        return _Everything()


class _Everything(ReaderState):
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, tree: Tensor | None = None
    ) -> Output:
        if first is None and not q.is_cuda:
            return exact(q, k, v, scale, newest(q.shape[2], q.device, tree))
        return super().attend(q, k, v, first, scale, tree)

    def work(self, q: Tensor, k: Tensor, first: Tensor | None, scale: float) -> Work:
        ends = torch.full((k.shape[0],), k.shape[2], device=k.device)
        return whole(ends, k.shape[1], k.shape[2], workers(k.device), starts=first)


class Recent(Reader):
    """The last `window` keys and the first `sinks` (StreamingLLM, 2309.17453; the short spans of MASFormer, LongGen).

    The window is measured from the first of the new queries, so that each of them has at least that many keys.
    """

    kind: ClassVar[str] = "recent"
    window: int = Field(default=1024, ge=1)
    sinks: int = Field(default=4, ge=0)

    def start(self) -> ReaderState:
        return _Recent(self.window, self.sinks)


class _Recent(ReaderState):
    def __init__(self, window: int, sinks: int) -> None:
        self.window, self.sinks = window, sinks

    def work(self, q: Tensor, k: Tensor, first: Tensor | None, scale: float) -> Work:
        b, hk, s = k.shape[:3]
        begin = torch.zeros(b, dtype=torch.int64, device=k.device) if first is None else first
        sinks = (begin + self.sinks).clamp(max=s)
        near = torch.maximum(sinks, torch.full_like(sinks, max(0, s - q.shape[2] + 1 - self.window)))
        bounds = torch.stack([begin, sinks, near, torch.full_like(sinks, s)], 1).repeat_interleave(hk, 0)
        keep = torch.tensor([True, False, True], device=k.device).expand(b * hk, 3)
        return select(keep, bounds, workers(k.device), places=s)
