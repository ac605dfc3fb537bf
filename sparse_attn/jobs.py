"""What the torch executor has to do for a plan: tiles that read the same keys put together, similar ones in one batch.

Shapes: J jobs, G jobs of one batch, M queries and N keys of each (padded to the longest), R rows, T tiles. Everything
is counted on the host, in numpy: index arithmetic over a few thousand rows, a few microseconds per call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hasten.sparse_attn.plan import Plan

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CALL = 16384
"""Pairs of tokens that cost as much as one more call of the batched kernel: so much padding is worth a call saved."""

ROOM = 2**16
"""Keys that one batch may gather: 64-dimensional keys and values take 32 MiB then."""


@dataclass(frozen=True, slots=True)
class Index:
    """Where the tokens of a batch are. places: [G, N] (padding repeats a real token); real: bool [G, N], None: all."""

    places: Ints
    real: Bools | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs of similar length. jobs: [G]; span: the range of keys that all of them read whole, where there is one."""

    jobs: Ints
    span: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Jobs:
    """All jobs of a plan.

    row, key_plane: [J], what each reads. first, count: [J], its queries within `places`: [all queries in tiles], query
    plane * Sq + original position.
    """

    plan: Plan
    rows: Rows
    row: Ints
    key_plane: Ints
    first: Ints
    count: Ints
    places: Ints

    def batches(self) -> Iterator[Batch]:
        """All jobs, in batches whose padding costs less than the calls they save."""
        keys = self.rows.tokens[self.row]
        low = np.where(self.rows.whole[self.row], self.rows.low[self.row], -1)
        order = np.lexsort((self.key_plane, self.count, low, keys))
        n, m, low = keys[order].tolist(), self.count[order].tolist(), low[order].tolist()
        start = 0
        while start < len(n):
            stop, most, real = start + 1, m[start], n[start] * m[start]
            while stop < len(n) and low[stop] == low[start] and (low[start] < 0 or n[stop] == n[start]):
                wide, size = max(most, m[stop]), stop + 1 - start
                padding = size * wide * n[stop] - real - n[stop] * m[stop]
                if padding > CALL * (size - 1) or size * (n[stop] + wide) > ROOM:
                    break
                most, real, stop = wide, real + n[stop] * m[stop], stop + 1
            yield Batch(order[start:stop], (low[start], low[start] + n[start]) if low[start] >= 0 else None)
            start = stop

    def queries(self, jobs: Ints) -> Index:
        """The queries of these jobs: see `places`."""
        return _padded(self.places, self.first[jobs], self.count[jobs])

    def keys(self, jobs: Ints, part: str = "all") -> Index | None:
        """Arranged places of the keys of these jobs within their planes; None where no job has any.

        part: "full" chunks (the mask has nothing to say), "ragged" ones, or "all".
        """
        row, rows = self.row[jobs], self.rows
        first = rows.full[row] if part == "ragged" else rows.start[row]
        last = rows.full[row] if part == "full" else rows.end[row]
        chunk = ragged(first, last - first)
        places = ragged(rows.chunk_start[chunk], rows.chunk_length[chunk])
        lengths = rows.up_to[last] - rows.up_to[first]
        if not lengths.any():
            return None
        return _padded(places, np.cumsum(lengths) - lengths, lengths)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a plan on the host. start, full, end: [R]; chunk_start, chunk_length: [N chunks].

    up_to: tokens in all chunks before each one. tokens: [R], keys of each row. low: [R], its first key; whole: bool
    [R], it is one range of keys that are all read, so that no gathering is needed.
    """

    start: Ints
    full: Ints
    end: Ints
    chunk_start: Ints
    chunk_length: Ints
    up_to: Ints
    tokens: Ints
    low: Ints
    whole: Bools


def jobs_of(plan: Plan, apart: Tensor | None = None) -> Jobs:
    """Tiles by what they read: those of the same row and key plane, and those of rows that are the same range.

    apart: bool [R], rows that something else stands in for besides: they are not like others of the same range, and
    have jobs even where they read nothing. Waits for the device.
    """
    rows = rows_of(plan)
    more = host(apart).astype(bool) if apart is not None else np.zeros_like(rows.whole)
    start, length, plane, row = (host(x) for x in (plan.tile_start, plan.tile_length, plan.tile_plane, plan.tile_row))
    used = (length > 0) & ((rows.tokens[row] > 0) | more[row])
    start, length, plane, row = start[used], length[used], plane[used], row[used]
    alias = np.arange(rows.tokens.size)
    alike = np.flatnonzero(rows.whole & ~more)
    if alike.size:
        _, first, which = np.unique(
            rows.low[alike] * (plan.keys + 1) + rows.tokens[alike], return_index=True, return_inverse=True
        )
        alias[alike] = alike[first[which]]
    key_planes = plan.heads[0] * plan.heads[2]
    names, owner = np.unique(alias[row] * key_planes + plane // plan.groups, return_inverse=True)
    count = np.bincount(owner, length, names.size).astype(np.int64)
    order = np.lexsort((start, plane, owner))
    start, length, plane = start[order], length[order], plane[order]
    place = ragged(start, length)
    plane = plane.repeat(length)
    if plan.q_perm is not None:
        perm = host(plan.q_perm)
        place = perm[plane if perm.shape[0] > 1 else 0, place]
    return Jobs(
        plan, rows, names // key_planes, names % key_planes, np.cumsum(count) - count, count,
        plane * plan.queries + place,
    )  # fmt: skip


def rows_of(plan: Plan) -> Rows:
    """The rows of a plan, on the host."""
    start, full, end = (host(x) for x in (plan.row_start, plan.row_full, plan.row_end))
    chunk_start, length = host(plan.chunk_start), host(plan.chunk_length)
    up_to = np.concatenate([np.zeros(1, np.int64), np.cumsum(length)])
    tokens = up_to[end] - up_to[start]
    chunk = ragged(start, end - start)
    row = np.arange(start.size).repeat(end - start)
    low = np.full(start.size, plan.keys, np.int64)
    high = np.zeros(start.size, np.int64)
    np.minimum.at(low, row, chunk_start[chunk])
    np.maximum.at(high, row, chunk_start[chunk] + length[chunk])
    whole = (tokens > 0) & (high - low == tokens)
    if plan.mask is not None:
        whole &= full == end
    return Rows(start, full, end, chunk_start, length, up_to, tokens, low, whole)


def ragged(starts: Ints, lengths: Ints) -> Ints:
    """arange(start, start + length) for each pair, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if ends.size else 0) + (starts - ends + lengths).repeat(lengths)


def _padded(values: Ints, first: Ints, count: Ints) -> Index:
    """values[first : first + count] of each job as one table, padded with the first value of the job (or any)."""
    longest = int(count.max())
    offsets = np.arange(longest)
    if (count == longest).all():
        return Index(values[first[:, None] + offsets], None)
    real = offsets < count[:, None]
    safe = np.where(count > 0, first, 0)
    return Index(values[np.where(real, first[:, None] + offsets, safe[:, None])], real)


def host(x: Tensor) -> Ints:
    """An index tensor as int64 on the host."""
    found: Ints = x.detach().cpu().numpy().astype(np.int64)
    return found
