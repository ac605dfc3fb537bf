"""Decoding on a CPU: stretches of the cache as views where they are long, gathered where they are short.

Shapes: see `hasten.sparse_attn.text.decode`; M = G * n queries of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.text.exact import attend_all, attend_some

if TYPE_CHECKING:
    from hasten.sparse_attn.text.decode import Work

FEW = 4
"""A row of at most so many stretches is read in place, each stretch by itself."""

Stretch = tuple[int, int]
"""First place, and the one after the last."""


def decode_cpu(q: Tensor, k: Tensor, v: Tensor, work: Work, scale: float, mask: Mask | None) -> Output:
    """`decode` without equal pieces, which a CPU's kernels make for themselves. mask: a tree (and no window) at most.

    What a mask touches, the last keys, is a part of its own; the rest needs none. There each row is read in place
    where it is made of few stretches (all rows together where these are the same, as with windows), else its keys are
    gathered.
    """
    b, hq, n, d = q.shape
    hk, places = k.shape[1], k.shape[2]
    rows = q.reshape(b * hk, hq // hk * n, d)
    last = places - mask.tree.shape[1] if mask is not None and mask.tree is not None else places
    chunks = Chunks.of(work)
    o = torch.zeros(*rows.shape[:2], v.shape[-1], dtype=q.dtype)
    lse = torch.full(rows.shape[:2], -math.inf)
    for each in chunks.before(last).alike():
        keys, values = (_planes(x, each.rows, b) for x in (k, v))
        found = each.attend(rows[each.rows], keys, values, scale)
        o[each.rows], lse[each.rows] = found[0].to(q.dtype), found[1].float()
    if mask is not None and mask.tree is not None:
        covered = chunks.covers(last, places)[:, None, :]
        allowed = mask.tree.repeat(hq // hk, 1) & covered
        keys, values = (_planes(x[:, :, last:], list(range(b * hk)), b) for x in (k, v))
        values = torch.where(covered.mT, values, torch.zeros_like(values))
        o, lse = merge([(o, lse), attend_some(rows, keys, values, scale, allowed)])
    return Output(o.view(b, hq, n, -1), lse.view(b, hq, n).float())


def _planes(x: Tensor, rows: list[int], batch: int) -> Tensor:
    """x [B or 1, Hk, S, D] of these rows: [len(rows), S, D], a view where that is possible."""
    if len(rows) == 1:
        return x[rows[0] // x.shape[1] if x.shape[0] == batch else 0, rows[0] % x.shape[1]][None]
    if x.shape[0] != batch:
        x = x.expand(batch, -1, -1, -1)
    flat = x.flatten(0, 1)
    return flat if len(rows) == flat.shape[0] else flat[rows]


def _gathered(k: Tensor, v: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """k [r, S, D] and v [r, S, Dv] at place int64 [r, T]. Row by row: whole keys are copied, and only those."""
    if len(place) == 1:
        return k[0].index_select(0, place[0])[None], v[0].index_select(0, place[0])[None]
    k, v = (torch.stack([one.index_select(0, at) for one, at in zip(x, place, strict=True)]) for x in (k, v))
    return k, v


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of each row: start, length int64 [R, M]; those that are not read have length 0."""

    start: Tensor
    length: Tensor

    @classmethod
    def of(cls, work: Work) -> Chunks:
        """Those that the pieces of `work` read."""
        most = work.chunk_start.numel() // work.rows
        count = torch.zeros(work.rows, dtype=torch.int64)
        count.index_add_(0, work.wk_row.long(), (work.wk_hi - work.wk_lo).long())
        read = torch.arange(most) < count[:, None]
        return cls(work.chunk_start.long().view(-1, most), work.chunk_length.long().view(-1, most) * read)

    def before(self, last: int) -> Chunks:
        """Without the places from `last` on."""
        return Chunks(self.start, torch.minimum(self.length, (last - self.start).clamp(min=0)))

    def covers(self, first: int, last: int) -> Tensor:
        """Are places first to last read? bool [R, last - first]."""
        place = torch.arange(first, last)
        low, high = self.start[:, :, None], (self.start + self.length)[:, :, None]
        return ((place >= low) & (place < high)).any(1)

    def alike(self) -> list[Alike]:
        """Rows that can be computed together; those that read nothing are left out."""
        totals = self.length.sum(1).tolist()
        same = bool((self.start == self.start[:1]).all() and (self.length == self.length[:1]).all())
        if same:
            groups = [list(range(len(totals)))] if totals[0] else []
            return [Alike(rows, self, stretches(self.start[0], self.length[0])) for rows in groups]
        found, gathered = [], dict[int, list[int]]()
        for row, total in enumerate(totals):
            if not total:
                continue
            own = stretches(self.start[row], self.length[row])
            if own is not None and len(own) <= FEW:
                found.append(Alike([row], self, own))
            else:
                gathered.setdefault(total, []).append(row)
        return found + [Alike(rows, self, None) for rows in gathered.values()]


def stretches(start: Tensor, length: Tensor) -> list[Stretch] | None:
    """Chunks [M] of one row, joined where one follows the other; None: more than twice `FEW`."""
    real = length > 0
    low, high = start[real], (start + length)[real]
    new = torch.ones_like(low, dtype=torch.bool)
    new[1:] = low[1:] != high[:-1]
    if int(new.sum()) > 2 * FEW:
        return None
    ends = torch.cat([new[1:], new[:1]])
    return list(zip(low[new].tolist(), high[ends].tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Alike:
    """Rows that read as many keys each; `stretches` where they read the very same places and these are few."""

    rows: list[int]
    chunks: Chunks
    stretches: list[Stretch] | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(o, lse) of q [r, M, D] over its keys in k [r, S, D], v [r, S, Dv]."""
        if self.stretches is not None:
            views = [(k[:, low:high], v[:, low:high]) for low, high in self.stretches]
        else:
            views = [_gathered(k, v, self._places())]
        parts = [attend_all(q[None], keys[None], values[None], scale) for keys, values in views]
        o, lse = parts[0] if len(parts) == 1 else merge(parts)
        return o[0], lse[0]

    def _places(self) -> Tensor:
        """Places that each row reads: int64 [r, T]."""
        start, length = self.chunks.start[self.rows].flatten(), self.chunks.length[self.rows].flatten()
        before = length.cumsum(0) - length
        jumps = (start - before).repeat_interleave(length)
        return (jumps + torch.arange(jumps.numel())).view(len(self.rows), -1)
