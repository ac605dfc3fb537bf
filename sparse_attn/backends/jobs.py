"""What the torch executor has to do for a plan: tiles that read the same keys put together, similar ones in one batch.

Shapes: J jobs, G jobs of one batch, M queries and N keys of each (padded to the longest), R rows, T tiles. Everything
is counted on the host, in numpy: index arithmetic over a few thousand rows, a few microseconds per call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hasten.sparse_attn.plan import Plan

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CALL = 16384
"""Pairs of tokens that cost as much as one more call of the batched kernel: so much padding is worth a call saved."""

ROOM = 2**13
"""Queries and keys of one batch, per thread: what is gathered should stay in a core's cache until it is read."""

TABLE = 2**18
"""Keys whose places are worked out at a time: enough to do it in few calls, few enough to hold."""


@dataclass(frozen=True, slots=True)
class Index:
    """Where the tokens of a batch are. places: [G, N] (padding repeats a real token); real: bool [G, N], None: all."""

    places: Ints
    real: Bools | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs of similar length. jobs: [G]; queries: M; keys: of the longest job.

    span: the range of keys that all of them read whole, where there is one and their key planes are consecutive.
    """

    jobs: Ints
    queries: int
    keys: int
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

    def batches(self, threads: int = 1) -> list[Batch]:
        """All jobs, in batches whose padding costs less than the calls they save, for so many threads."""
        keys = self.rows.tokens[self.row]
        low = np.where(self.rows.whole[self.row], self.rows.low[self.row], -1)
        order = np.lexsort((self.key_plane, self.count, low, keys))
        n, m, low = keys[order].tolist(), self.count[order].tolist(), low[order].tolist()
        found, start = [], 0
        while start < len(n):
            stop, most, real = start + 1, m[start], n[start] * m[start]
            while stop < len(n) and low[stop] == low[start] and (low[start] < 0 or n[stop] == n[start]):
                wide, size = max(most, m[stop]), stop + 1 - start
                padding = size * wide * n[stop] - real - n[stop] * m[stop]
                if padding > CALL * (size - 1) or size * (n[stop] + wide) > ROOM * threads:
                    break
                most, real, stop = wide, real + n[stop] * m[stop], stop + 1
            planes = self.key_plane[order[start:stop]]
            alike = low[start] >= 0 and bool((np.diff(planes) == 1).all())
            span = (low[start], low[start] + n[start]) if alike else None
            found.append(Batch(order[start:stop], most, n[stop - 1], span))
            start = stop
        return found

    def queries(self, batches: Sequence[Batch]) -> tuple[Ints, Bools | None]:
        """The queries of these batches, [G, M] after [G, M]: places as in `places`, and which are not padding."""
        jobs, widths = _joined(batches, [batch.queries for batch in batches])
        return _padded(self.places, self.first[jobs], self.count[jobs], widths)

    def keys(self, batches: Sequence[Batch], part: str = "all") -> list[Index | None]:
        """The keys of each batch: key plane * Sk + arranged place; None where no job of a batch has any.

        part: "full" chunks (the mask has nothing to say), "ragged" ones, or "all".
        """
        jobs = np.concatenate([batch.jobs for batch in batches])
        row, rows = self.row[jobs], self.rows
        first = rows.full[row] if part == "ragged" else rows.start[row]
        last = rows.full[row] if part == "full" else rows.end[row]
        lengths = rows.up_to[last] - rows.up_to[first]
        sizes = np.array([batch.jobs.size for batch in batches])
        ends = np.cumsum(sizes)
        longest = np.maximum.reduceat(lengths, ends - sizes)
        chunk = ragged(first, last - first)
        lead = (self.key_plane[jobs] * self.plan.keys).repeat(last - first)
        places = ragged(rows.chunk_start[chunk] + lead, rows.chunk_length[chunk])
        flat, real = _padded(places, np.cumsum(lengths) - lengths, lengths, longest.repeat(sizes), in_order=True)
        found: list[Index | None] = []
        start = 0
        for size, wide in zip(sizes.tolist(), longest.tolist(), strict=True):
            own = slice(start, start + size * wide)
            some = real[own].reshape(size, wide) if real is not None and not real[own].all() else None
            found.append(Index(flat[own].reshape(size, wide), some) if wide else None)
            start = own.stop
        return found


def tables(batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Runs of batches whose keys fit one table (see `TABLE`)."""
    some: list[Batch] = []
    held = 0
    for batch in batches:
        size = batch.jobs.size * batch.keys
        if some and held + size > TABLE:
            yield some
            some, held = [], 0
        some.append(batch)
        held += size
    if some:
        yield some


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
    found: Ints = np.arange(ends[-1] if ends.size else 0) + (starts - ends + lengths).repeat(lengths)
    return found


def _joined(batches: Sequence[Batch], each: list[int]) -> tuple[Ints, Ints]:
    """The jobs of all batches, and the number of its batch in `each` for every one of them."""
    sizes = [batch.jobs.size for batch in batches]
    return np.concatenate([batch.jobs for batch in batches]), np.array(each).repeat(sizes)


def _padded(
    values: Ints, first: Ints, count: Ints, widths: Ints, in_order: bool = False
) -> tuple[Ints, Bools | None]:
    """values[first : first + count] of each job, padded to its width with the first of them; and which are not padding.

    in_order: the jobs' values follow each other. A job without values is padded with any.
    """
    if (count == widths).all():
        return values if in_order else values[ragged(first, count)], None
    offset = ragged(np.zeros_like(widths), widths)
    real = offset < count.repeat(widths)
    at = first.repeat(widths) + np.where(real, offset, 0)
    return values[np.minimum(at, values.size - 1)], real


def host(x: Tensor) -> Ints:
    """An index tensor as int64 on the host."""
    found: Ints = x.detach().cpu().numpy().astype(np.int64)
    return found
