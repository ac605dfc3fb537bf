"""The keys and values of one layer by physical slot: appended, drafted behind, committed, evicted, packed.

Two lengths are kept apart. The *logical* place of a token is its number among the tokens of its row; positions and
causality go by it. The *physical* slot is where it stands; memory goes by that. `KVStore` (text diffusion) has them
equal, since a canvas is rewritten where it stands; here what is evicted leaves, and the rest moves together.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hasten.caching.decode.packed import NONE, Far, Flat, Growing, Packed, Some, gathered, stored
from hasten.caching.decode.view import View
from hasten.caching.store import numbered
from hasten.errors import UsageError

GROW = 8
"""A full buffer grows by an eighth, and by this many slots at least, so that a new token need not copy all others."""

EVEN = 0.95
"""Heads that hold at least this share of what they would, were they all as long as the longest, stay a rectangle."""


@dataclass(slots=True)
class _Tail:
    """New tokens in the buffer, behind what is committed. place int32 [B, N]."""

    size: int
    place: Tensor
    reads: Tensor | None
    holes: bool


class Slots:
    """One layer of a cache.

    place: int32 [B, P, S], the logical place of what each committed slot holds, ascending in each row but for `NONE`.
    notes: float32 [B, Hk, S] by name: what a policy remembers of each slot, which moves with it. tokens: how many each row
    holds, the mean over its heads, known to the host.
    """

    def __init__(self) -> None:
        self.k = self.v = torch.empty(0)
        self.place = torch.empty(0, dtype=torch.int32)
        self.notes: dict[str, Tensor] = {}
        self.old: tuple[Packed, Packed] | None = None
        self.behind = 0  # slots that are packed, the first ones
        self.used = 0  # columns of the buffer in use
        self.ends: list[int] = []  # the next free column of each row
        self.tokens: list[float] = []
        self.holes = False
        self.moves = 0  # how often slots left, so that the others stand elsewhere
        self.tail: _Tail | None = None

    # --- sizes --------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """S, committed."""
        return self.behind + self.used

    @property
    def bytes(self) -> int:
        """Bytes of memory held, spare columns, places and notes included, but for what is in a slower memory."""
        packed = [t for part in self.old or () if not isinstance(part, Far) for t in part.tensors()]
        return stored([self.k, self.v, self.place, *self.notes.values(), *packed])

    @property
    def far_bytes(self) -> int:
        """Bytes held in the CPU's memory as the slower of two."""
        return stored([t for part in self.old or () if isinstance(part, Far) for t in part.tensors()])

    def positions(self) -> Tensor:
        """The logical place of each committed slot, int32 [B, P, S]; `NONE` where it holds nothing."""
        return self.place

    def held(self) -> Tensor:
        """How many tokens are held: int64 [B, P]."""
        return (self.place >= 0).sum(-1)

    # --- writing ------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, place: Tensor, holes: bool = False) -> None:
        """Keep new tokens: `scratch` and `commit`."""
        self.scratch(k, v, place, holes=holes)
        self.commit()

    def scratch(self, k: Tensor, v: Tensor, place: Tensor, reads: Tensor | None = None, holes: bool = False) -> None:
        """Let new tokens be read that are not committed yet: k [B, Hk, N, D], v [B, Hk, N, Dv], place int [B, N].

        reads: see `View`. holes: a place may be `NONE` (padding), whose key and value are replaced by zeros.
        """
        if self.tail is not None:
            raise UsageError("Slots.scratch(): a draft is open already. Commit or discard it first.")
        size = k.shape[2]
        if not self.ends:
            self.ends, self.tokens = [0] * k.shape[0], [0.0] * k.shape[0]
            self.place = place.new_empty((k.shape[0], 1, 0), dtype=torch.int32)
            self.k, self.v = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (k, v))
        if holes:
            empty = (place < 0)[:, None, :, None]
            k, v = k.masked_fill(empty, 0.0), v.masked_fill(empty, 0.0)
        self._room(self.used + size)
        self.k[:, :, self.used : self.used + size] = k
        self.v[:, :, self.used : self.used + size] = v
        self.tail = _Tail(size, place.to(torch.int32), reads, holes)

    def _room(self, columns: int) -> None:
        """See to it that the buffer has so many columns."""
        if columns <= self.k.shape[2]:
            return
        columns += max(GROW, self.used // 8) if self.used else 0
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], columns, old.shape[3])
            new[:, :, : self.used] = old[:, :, : self.used]
            setattr(self, name, new)

    def commit(self, index: Tensor | None = None, counts: list[int] | None = None) -> None:
        """Keep tokens of the tail: index int64 [B, A], numbers in it (the accepted path of each row), `NONE` behind the
        last one; None: all. counts: how many each row keeps, where the host knows. The rest is gone.

        Kept tokens must come in ascending order of their places.
        """
        tail = self._open("commit")
        self.tail = None
        rows = len(self.ends)
        if index is None and all(end == self.used for end in self.ends):
            self.used += tail.size
            self.ends = [self.used] * rows
            self.holes |= tail.holes
            self._more_places(tail.place[:, None])
            real = (tail.place >= 0).sum(1).tolist() if tail.holes else [tail.size] * rows
            self.tokens = [held + new for held, new in zip(self.tokens, real, strict=True)]
            return
        if index is None:
            index = torch.arange(tail.size, device=self.k.device).expand(rows, -1)
        counts = (index >= 0).sum(1).tolist() if counts is None else counts
        self._move(tail, index, counts)
        real = counts
        if tail.holes:
            taken = tail.place.gather(1, index.clamp(min=0)).masked_fill(index < 0, NONE)
            real = (taken >= 0).sum(1).tolist()
        self.tokens = [held + new for held, new in zip(self.tokens, real, strict=True)]

    def _move(self, tail: _Tail, index: Tensor, counts: list[int]) -> None:
        """Each row's accepted tokens to the end of that row."""
        device, start = self.k.device, self.used
        row = [b for b, count in enumerate(counts) for _ in range(count)]
        number = torch.tensor([j for count in counts for j in range(count)], device=device, dtype=torch.int64)
        column = torch.tensor([end + j for end, count in zip(self.ends, counts, strict=True) for j in range(count)],
                              device=device, dtype=torch.int64)  # fmt: skip
        rows = torch.tensor(row, device=device, dtype=torch.int64)
        source = index[rows, number]
        for buffer in (self.k, self.v):
            buffer[rows, :, column] = buffer[rows, :, start + source]
        self.ends = [end + count for end, count in zip(self.ends, counts, strict=True)]
        self.used = max(self.ends)
        self.holes |= tail.holes or any(end != self.used for end in self.ends)
        self._more_places(self.place.new_full((len(counts), self.place.shape[1], self.used - start), NONE)
                          if self.used > start else None)  # fmt: skip
        self.place[rows, :, self.behind + column] = tail.place[rows, source][:, None]

    def _more_places(self, place: Tensor | None) -> None:
        """Places of new slots, int32 [B, 1 or P, n]; nothing has been noted of them."""
        if place is None:
            return
        place = place.expand(-1, self.place.shape[1], -1)
        self.place = torch.cat([self.place, place], -1)
        for name, note in self.notes.items():
            self.notes[name] = torch.nn.functional.pad(note, (0, place.shape[-1]))

    def discard(self) -> None:
        """Drop the tail."""
        self._open("discard")
        self.tail = None

    def _open(self, what: str) -> _Tail:
        if self.tail is None:
            raise UsageError(f"Slots.{what}(): there is no draft. Write one with scratch() first.")
        return self.tail

    def refresh(self, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """Write over committed slots, int64 [B, n], k [B, Hk, n, D], v [B, Hk, n, Dv]; they keep their places. Slots that
        are packed cannot be written: `UsageError`."""
        if self.behind and bool((slot < self.behind).any()):
            raise UsageError(f"Slots.refresh(): the first {self.behind} slots are packed and are not written any more.")
        rows = torch.arange(slot.shape[0], device=slot.device)[:, None]
        self.k[rows, :, slot - self.behind] = k.transpose(1, 2)
        self.v[rows, :, slot - self.behind] = v.transpose(1, 2)

    # --- reading ------------------------------------------------------------------------------------

    def view(self) -> View:
        """All that may be read; the buffer itself where nothing is packed (do not write to it)."""
        near = self.near()
        if self.old is None:
            return near
        k, v = (part.read().to(new.dtype) for part, new in zip(self.old, (near.k, near.v), strict=True))
        return near.behind(k, v, self.place[..., : self.behind])

    def near(self) -> View:
        """What is not packed, alone."""
        tail, place = self.tail, self.place[..., self.behind :]
        columns = self.used + (tail.size if tail else 0)
        if tail is not None:
            place = torch.cat([place, tail.place[:, None].expand(-1, place.shape[1], -1)], -1)
        return View(
            self.k[:, :, :columns], self.v[:, :, :columns], place, columns - self.used, tail.reads if tail else None,
            self.holes or bool(tail and tail.holes),
        )  # fmt: skip

    @property
    def partly(self) -> bool:
        """Is something packed of which some may be read without the others?"""
        return self.old is not None and all(isinstance(part, Some) for part in self.old)

    def view_of(self, index: Tensor) -> View:
        """Of what is packed these slots alone, int64 [B, Hk, n], `NONE` for none, and all that is not packed. For a store
        that is `partly` readable."""
        assert self.old is not None and self.partly
        k, v = (cast(Some, part).at(index).to(new.dtype) for part, new in zip(self.old, (self.k, self.v), strict=True))
        place = self.place.expand(-1, index.shape[1], -1).gather(-1, index.clamp(min=0))
        return self.near().behind(k, v, torch.where(index >= 0, place, NONE).to(torch.int32))

    # --- leaving ------------------------------------------------------------------------------------

    def keep(self, mask: Tensor) -> None:
        """Evict what `mask`, bool [B, 1 or Hk, S], does not name; memory is freed. Waits for the device once.

        Where heads keep different numbers of tokens, these stand one after another (`Flat`), so that no head pays for
        the longest.
        """
        if self.tail is not None:
            raise UsageError("Slots.keep(): a draft is open. Commit or discard it first.")
        self.moves += 1
        planes = max(mask.shape[1], self.place.shape[1])
        mask = (mask & (self.place >= 0)).expand(-1, planes, -1)
        if self.old is None or isinstance(self.old[0], Flat):
            self._keep_together(mask)
        else:
            self._keep_apart(mask)

    def _keep_together(self, mask: Tensor) -> None:
        counts: list[list[int]] = mask.sum(-1).tolist()
        width, index = self._chosen(mask, counts)
        k, v = self.view().k, self.view().v
        self._follow([index])
        total = sum(map(sum, counts))
        self.tokens = [sum(row) / len(row) for row in counts]
        self.holes = total < len(counts) * mask.shape[1] * width
        if any(len(set(row)) > 1 for row in counts) and total < EVEN * len(counts) * mask.shape[1] * width:
            self.old, self.behind, self.used = (Flat.of(k, index, counts), Flat.of(v, index, counts)), width, 0
            self.k, self.v = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (k, v))
            self.ends = [0] * len(self.ends)
            return
        self.old, self.behind, self.used = None, 0, width
        self.k, self.v, self.ends = gathered(k, index), gathered(v, index), [max(row) for row in counts]

    def _keep_apart(self, mask: Tensor) -> None:
        """What is packed stays packed: the two parts shrink each by itself."""
        assert self.old is not None
        sums = torch.stack([mask[..., : self.behind].sum(-1), mask[..., self.behind :].sum(-1)])
        old, new = sums.tolist()
        self.tokens = [(sum(a) + sum(b)) / len(a) for a, b in zip(old, new, strict=True)]
        before, packed = self._chosen(mask[..., : self.behind], old)
        width, dense = self._chosen(mask[..., self.behind :], new)
        self.k, self.v = (gathered(x[:, :, : self.used], dense) for x in (self.k, self.v))
        self.old = (self.old[0].take(packed), self.old[1].take(packed)) if before else None
        self._follow([packed, torch.where(dense >= 0, dense + self.behind, NONE)])
        self.behind, self.used, self.ends = before, width, [max(row) for row in new]
        self.holes = sum(map(sum, old)) + sum(map(sum, new)) < len(old) * mask.shape[1] * (before + width)

    @staticmethod
    def _chosen(mask: Tensor, counts: list[list[int]]) -> tuple[int, Tensor]:
        """The slots that a mask [B, P, S] names: how many at most, and int64 [B, P, width], ascending, `NONE` behind."""
        width, slots = max(map(max, counts)), mask.shape[-1]
        index = numbered(mask.reshape(-1, slots), width, slots).view(*mask.shape[:2], width)
        return width, torch.where(index < slots, index, NONE)

    def _follow(self, parts: list[Tensor]) -> None:
        """Places and notes go along: the new slots are these, int64 [B, P, n] each."""
        index = torch.cat(parts, -1)
        near = index.clamp(min=0)
        place = self.place.expand(-1, index.shape[1], -1).gather(-1, near)
        self.place = torch.where(index >= 0, place, NONE).to(torch.int32)
        for name, note in self.notes.items():
            self.notes[name] = note.gather(-1, near.expand(-1, note.shape[1], -1)).masked_fill(index < 0, 0.0)

    def rows(self, index: Tensor) -> None:
        """These rows, int64 [m], a row perhaps several times (beams, samples of one prompt)."""
        self.k, self.v, self.place = (x.index_select(0, index) for x in (self.k, self.v, self.place))
        self.notes = {name: note.index_select(0, index) for name, note in self.notes.items()}
        if self.old is not None:
            self.old = (self.old[0].rows(index), self.old[1].rows(index))
        if self.old is not None and isinstance(self.old[0], Flat):  # the longest may be gone
            width, behind = self.old[0].width, self.behind
            self.place, *notes = (torch.cat([x[..., :width], x[..., behind:]], -1) for x in (self.place, *self.notes.values()))
            self.notes, self.behind = dict(zip(self.notes, notes, strict=True)), width
        order = index.tolist()
        self.ends, self.tokens = [self.ends[row] for row in order], [self.tokens[row] for row in order]
        self.used = max(self.ends)
        self.place = self.place[..., : self.slots]
        self.notes = {name: note[..., : self.slots] for name, note in self.notes.items()}

    def restore(self, k: Tensor, v: Tensor, place: Tensor) -> None:
        """Hold what another store held: k [B, Hk, S, D], v [B, Hk, S, Dv], place int [B, P, S], of rows that are filled to
        the end; this one must be empty."""
        if self.ends:
            raise UsageError("Slots.restore(): this store holds something already. Take a new one.")
        self.k, self.v, self.place = k, v, place.to(torch.int32)
        self.used = k.shape[2]
        self.ends, self.holes = [self.used] * k.shape[0], bool((place < 0).any())
        self.tokens = [float(count) for count in (place >= 0).sum(-1).float().mean(-1).tolist()]

    # --- packing ------------------------------------------------------------------------------------

    def pack(self, form: Callable[[Tensor, bool], Growing], newest: int, group: int, least: int = 1) -> bool:
        """Put all but the `newest` columns of the buffer, in whole groups of `group`, into another form; True where there
        were any (`least`, or more). form(x [B, Hk, n, D], is it keys?). What is packed is packed once and never written again.
        """
        free = min(self.ends, default=0) - newest
        count = free - free % group
        if count < max(1, least) or self.tail is not None:
            return False
        new = form(self.k[:, :, :count], True), form(self.v[:, :, :count], False)
        if self.old is None:
            self.old = new
        elif isinstance(self.old[0], Flat):
            raise UsageError("Slots.pack(): heads of different lengths cannot be packed. Use a head budget that is even.")
        else:
            held: Any = self.old
            self.old = held[0].joined(new[0]), held[1].joined(new[1])
        self.k, self.v = (x[:, :, count : self.used].clone() for x in (self.k, self.v))
        self.behind, self.used, self.ends = self.behind + count, self.used - count, [end - count for end in self.ends]
        return True
