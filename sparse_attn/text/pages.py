"""Pages of the cache that a query may need, by what is known of each: Quest's bounds, ShadowKV's landmarks.

Shapes: B batch, Hq, Hk heads, n new queries, S keys, C whole pages, D head dimension, R = B * Hk rows.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.sparse_attn.text.decode import Work, select, workers
from hasten.sparse_attn.text.reader import Reader, ReaderState, Witness


class Pages(Reader):
    """The `top` pages of `page` keys that may matter most to the new queries, the first `sinks` pages, and what is newest.

    by: what is kept of a page. "bounds": its smallest and largest number along each coordinate, so that no key's q.k is
    above the page's score (Quest, 2406.10774, pages of 16). "means": its mean key, a landmark (ShadowKV, 2410.21465,
    chunks of 8); then the `outliers` pages whose keys are least like their mean, by their smallest cosine, are always read.
    Scores are shares of the softmax over pages for "means", so that heads of a group compare; the best of a group's heads
    and of the new queries counts. Every sample and key head chooses for itself.

    of: "cache": pages are made of all keys; "prompt": of the prompt's, and all that came after it is read (ShadowKV). near: keys
    at the end of either that are read in any case. Pages of a prompt need its keys once: then chosen pages can be read from a
    store that holds them in another form (`places`). Without a prompt that was seen there are none of these, and all is read.
    """

    kind: ClassVar[str] = "pages"
    page: int = Field(default=16, ge=1)
    top: int = Field(default=128, ge=1)
    by: Literal["bounds", "means"] = "bounds"
    outliers: int = Field(default=0, ge=0)
    sinks: int = Field(default=1, ge=0)
    of: Literal["cache", "prompt"] = "cache"
    near: int = Field(default=0, ge=0)

    def start(self) -> ReaderState:
        return _Pages(self)


class _Pages(ReaderState):
    """low, high: [B, Hk, C, D] in the dtype of the keys (for means both are the mean). odd: float32 [B, Hk, C], the smallest cosine."""

    def __init__(self, part: Pages) -> None:
        self.part = part
        self.low = self.high = self.odd = torch.empty(0)
        self.witness: Witness | None = None
        self.prompt = 0  # keys of the prompt

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> None:
        if self.part.of == "prompt":
            self.prompt = k.shape[2]
            self._summarise(k, self._pages(k.shape[2], 0))

    def _pages(self, keys: int, new: int) -> int:
        """Whole pages of so many keys, the last `new` of which belong to the new queries."""
        end = keys - new if self.part.of == "cache" else min(self.prompt, keys - new)
        return max(0, end - self.part.near) // self.part.page

    def num_bytes(self) -> int:
        known = (self.low, self.odd) if self.high is self.low else (self.low, self.high, self.odd)
        return sum(x.numel() * x.element_size() for x in known)

    def work(self, q: Tensor, k: Tensor, first: Tensor | None, scale: float) -> Work:
        part, (b, hk, s, _) = self.part, k.shape
        begin = torch.zeros(b, dtype=torch.int64, device=k.device) if first is None else first
        pages = self._pages(s, q.shape[2])
        self._summarise(k, pages)
        edges = torch.arange(pages + 1, device=k.device) * part.page
        bounds = torch.cat([edges.expand(b, -1).maximum(begin[:, None]), torch.full((b, 1), s, device=k.device)], 1)
        keep = torch.ones(b, hk, pages + 1, dtype=torch.bool, device=k.device)
        if pages > part.top + part.sinks + part.outliers:
            keep[..., :pages] = self._chosen(q, scale, pages, begin)
        rows = bounds.repeat_interleave(hk, 0)
        return select(keep.view(b * hk, -1), rows, workers(k.device), places=s)

    def places(self, q: Tensor, keys: int, first: Tensor | None, scale: float) -> Tensor | None:
        part, pages, b = self.part, keys // self.part.page, q.shape[0]
        if part.of != "prompt" or self.witness is None or not pages or keys % part.page or self.low.shape[2] < pages:
            return None
        begin = torch.zeros(b, dtype=torch.int64, device=q.device) if first is None else first
        most = part.top + part.sinks + part.outliers
        if pages <= most:
            keep = torch.ones(b, self.low.shape[1], pages, dtype=torch.bool, device=q.device)
        else:
            keep = self._chosen(q, scale, pages, begin)
        width = min(pages, most) if first is None else int(keep.sum(-1).max())
        page = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :width]
        place = page[..., None] * part.page + torch.arange(part.page, device=q.device)
        real = keep.gather(-1, page)[..., None] & (place >= begin[:, None, None, None])
        self.read = real.sum()
        return torch.where(real, place, -1).flatten(2)

    def rows(self, index: Tensor) -> None:
        if self.witness is not None:
            same = self.high is self.low
            self.low, self.high, self.odd = (x.index_select(0, index) for x in (self.low, self.high, self.odd))
            self.high = self.low if same else self.high
            self.witness.keys = self.witness.keys.index_select(0, index)

    def _summarise(self, k: Tensor, pages: int) -> None:
        """Pages that are whole by now, and all of them anew where this is another cache than last time."""
        known = self.low.shape[2] if self.witness is not None and self.witness.knows(k) else 0
        if pages <= known:
            return
        new = k[:, :, known * self.part.page : pages * self.part.page].float()
        new = new.reshape(*k.shape[:2], -1, self.part.page, k.shape[3])
        if self.part.by == "bounds":
            found = [new.amin(3).to(k.dtype), new.amax(3).to(k.dtype), new.new_zeros(new.shape[:3])]
        else:
            mean = new.mean(3)
            found = [mean.to(k.dtype), mean.to(k.dtype), torch.cosine_similarity(new, mean[:, :, :, None], dim=-1).amin(-1)]
        if known:
            held = (self.low, self.high, self.odd)
            found = [torch.cat([old[:, :, :known], more], 2) for old, more in zip(held, found, strict=True)]
        self.low, self.high, self.odd = found
        self.high = self.low if self.part.by == "means" else self.high
        self.witness = Witness(k, pages * self.part.page - 1)

    def _chosen(self, q: Tensor, scale: float, pages: int, begin: Tensor) -> Tensor:
        """bool [B, Hk, C]: sinks, outliers and the best."""
        part, (b, hq, n, d) = self.part, q.shape
        hk = self.low.shape[1]
        rows = q.reshape(b, hk, hq // hk * n, d).float() * scale
        low, high = self.low[:, :, :pages].float(), self.high[:, :, :pages].float()
        number, opened = torch.arange(pages, device=q.device), (begin + part.page - 1) // part.page
        empty = (number < opened[:, None])[:, None]  # or begun with padding: read, whatever it is worth
        if part.by == "means":
            scores = (rows @ low.mT).masked_fill(empty[:, :, None], -math.inf).softmax(-1).amax(2)
        else:
            scores = (rows.clamp(min=0) @ high.mT + rows.clamp(max=0) @ low.mT).amax(2)
        sure = (number < (opened + part.sinks)[:, None])[:, None].expand(b, hk, -1).clone()
        if part.outliers:
            odd = self.odd[:, :, :pages].masked_fill(empty | sure, math.inf)
            sure.scatter_(2, odd.topk(part.outliers, dim=-1, largest=False).indices, True)
        best = scores.masked_fill(empty | sure, -math.inf).topk(part.top, dim=-1).indices
        return sure.scatter(2, best, True)
