"""Makes calls of the model out of what policies ask for: which tokens, who reads whom, whose logits.

Shapes: B texts, L slots, m texts with N computed tokens each, R of them whose logits are wanted, K drafts of a text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.caching.kv import Rows
from hasten.caching.store import KVStore, Pass, numbered
from hasten.canvas import Canvas, TextFacts


@dataclass(slots=True)
class Wanted:
    """Slots whose logits are wanted, bool [B, L], and at most how many of them a text has."""

    slots: Tensor
    most: int


def plain(
    rows: Rows, canvas: Canvas, wanted: Wanted, facts: TextFacts, store: KVStore, shadows: Wanted | None = None
) -> Pass:
    """The call that computes `rows` of the canvas. shadows: written slots whose logits are wanted as if they were not
    written, while everybody else sees that they are."""
    members, run = _members(rows, canvas)
    want = wanted.slots[members]
    slots = _slots(rows, canvas, members, want, facts)
    ids = F.pad(canvas.ids[members], (0, 1), value=facts.pad_id).gather(1, slots)
    read, target = _read(slots, want, wanted.most, facts)
    free = shadows is None and facts.block is None and (rows.whole or rows.full and store.full.issuperset(rows.members) and rows.keep == "store")
    visible = None if free else _visible(slots, members, rows.keep, canvas, facts, store)
    work = torch.zeros(len(rows.members), dtype=torch.float64, device=slots.device) if rows.depth is not None else None
    now = Pass(members, slots, ids, rows.keep, visible, read, target, rows.whole, run, rows.depth, work)
    return now if shadows is None else _shadowed(now, shadows, canvas, facts, store)


def _shadowed(now: Pass, wanted: Wanted, canvas: Canvas, facts: TextFacts, store: KVStore) -> Pass:
    """`now`, and behind its tokens a mask for each wanted slot. It reads what a token there reads, but itself in place of
    that token; nobody else reads it."""
    assert facts.mask_id is not None and now.visible is not None
    bins, number = canvas.slots, now.slots.shape[1]
    seats = numbered(wanted.slots[now.members], min(wanted.most, bins), bins)
    if now.keep == "none":
        keys, held = now.slots, now.slots < bins
    else:
        keys = torch.arange(bins + 1, device=seats.device)[None].expand(len(seats), -1)
        held = _held(now.slots, now.members, canvas, store)
    past = held[:, None] & _rule(seats, keys, facts) & (seats[..., None] != keys[:, None])
    nobody = torch.zeros(len(seats), number, seats.shape[1], dtype=torch.bool, device=seats.device)
    others = torch.cat([now.visible.expand(len(seats), number, -1), nobody], 2)
    place = number + torch.arange(seats.shape[1], device=seats.device)
    total = number + seats.shape[1]
    read = torch.where(now.read < number, now.read, total)
    return replace(
        now,
        slots=torch.cat([now.slots, seats], 1),
        ids=torch.cat([now.ids, torch.full_like(seats, facts.mask_id)], 1),
        visible=torch.cat([others, torch.cat([past, _self(seats).expand(len(seats), -1, -1)], 2)], 1),
        read=torch.cat([read, torch.where(seats < bins, place, total)], 1),
        target=torch.cat([now.target, seats], 1),
        shadows=seats.shape[1],
    )


def copies(
    rows: Rows, numbers: list[int], many: Canvas, most: int, wanted: Wanted, facts: TextFacts, store: KVStore
) -> tuple[Pass, Tensor]:
    """The call that computes `rows` of the first `numbers` drafts of each text as texts of their own, for rows that share
    nothing; and which drafts these are, int64 [n]. many: the drafts, `most` of each text."""
    pairs = [(i, draft) for i, number in enumerate(numbers) for draft in range(number)]
    index = torch.tensor([i for i, _ in pairs], device=many.ids.device)
    which = [rows.members[i] * most + draft for i, draft in pairs]
    stretch = None if rows.stretch is None else (rows.stretch[0][index], rows.stretch[1][index])
    repeated = replace(rows, members=which, tokens=rows.tokens[index], stretch=stretch)
    now = plain(repeated, many, Wanted(wanted.slots.repeat_interleave(most, 0), wanted.most), facts, store)
    drafted = now.members
    return replace(now, members=drafted // most, run=None), drafted


def drafts(
    rows: Rows, texts: Tensor, numbers: list[int], canvas: Canvas, wanted: Wanted, facts: TextFacts, store: KVStore
) -> Pass:
    """The call that computes `rows` of drafts of the canvas. texts int64 [B, K, L]: the drafts; numbers: how many of them
    each member has, the first ones.

    The drafts of a text stand one behind the other in one call and share what the store holds; none sees another. Logits
    come out draft by draft: read and target are [m, K * R].
    """
    members, run = _members(rows, canvas)
    want, number = wanted.slots[members], texts.shape[1]
    slots = _slots(rows, canvas, members, want, facts)
    ids = F.pad(texts[members], (0, 1), value=facts.pad_id).gather(2, slots[:, None].expand(-1, number, -1)).flatten(1)
    read, target = _read(slots, want, wanted.most, facts)
    own = torch.arange(number, device=slots.device)[:, None] * slots.shape[1]
    real = torch.arange(number, device=slots.device) < torch.tensor(numbers, device=slots.device)[:, None]
    many = torch.where(read[:, None] < slots.shape[1], read[:, None] + own, number * slots.shape[1]).flatten(1)
    every = torch.where(real[..., None], slots[:, None], canvas.slots).flatten(1)
    about = torch.where(real[..., None], target[:, None], canvas.slots).flatten(1)
    draft = torch.arange(number, device=slots.device).repeat_interleave(slots.shape[1])
    same = (draft[:, None] == draft[None, :])[None]
    among = same & _rule(every, every, facts) & (every < canvas.slots)[:, None] | _self(every)
    new = torch.zeros_like(store.present[members]).scatter(1, slots, True)
    held = _held(slots, members, canvas, store) & ~new
    place = torch.arange(canvas.slots + 1, device=slots.device)[None].expand(len(members), -1)
    past = held[:, None] & _rule(every, place, facts)
    seen = torch.cat([past.expand(-1, every.shape[1], -1), among.expand(len(members), -1, -1)], 2)
    return Pass(members, every, ids, "scratch", seen, many, about, run=run)


def _members(rows: Rows, canvas: Canvas) -> tuple[Tensor, slice | None]:
    """The texts int64 [m]; and as a slice, where they follow one another."""
    first, count = rows.members[0], len(rows.members)
    run = slice(first, first + count) if rows.members == list(range(first, first + count)) else None
    return torch.tensor(rows.members, device=canvas.ids.device), run


def _slots(rows: Rows, canvas: Canvas, members: Tensor, want: Tensor, facts: TextFacts) -> Tensor:
    """The slots to compute, int64 [m, N] in ascending order, L where none.

    What is written into slot i of a model with shifted logits comes out of slot i - 1, which is computed, too.
    """
    bins, width = canvas.slots, rows.width
    if rows.whole:
        return canvas.place.expand(len(rows.members), -1)
    if rows.stretch is None:
        tokens = rows.tokens & canvas.used[members]
        if facts.shifted and rows.runs:
            tokens, width = tokens | F.pad(want & tokens, (0, 1))[:, 1:], width + rows.runs
        return numbered(tokens, min(width, bins), bins)
    first, last = rows.stretch
    low, last = first, torch.minimum(last, canvas.end[members])
    if facts.shifted:  # always, not only while slot `first` is open: what is read must not depend on when it was written
        low, width = (first - 1).clamp(min=0), width + 1
    slots = low[:, None] + torch.arange(min(width, bins), device=low.device)
    return torch.where(slots < last[:, None], slots, bins)


def _read(slots: Tensor, want: Tensor, most: int, facts: TextFacts) -> tuple[Tensor, Tensor]:
    """Which of the computed tokens give the wanted logits, and what slots those are about; int64 [m, R] each."""
    bins = want.shape[1]
    about = torch.where(slots < bins, slots + int(facts.shifted), bins).clamp(max=bins)
    asked = F.pad(want, (0, 1)).gather(1, about)
    read = numbered(asked, min(most, slots.shape[1]), slots.shape[1])
    return read, F.pad(about, (0, 1), value=bins).gather(1, read)


def _visible(
    slots: Tensor, members: Tensor, keep: str, canvas: Canvas, facts: TextFacts, store: KVStore
) -> Tensor:  # fmt: skip
    """Who reads whom, bool [m, N, keys]. What is no slot reads itself, so that no softmax is empty."""
    if keep == "none":
        return _rule(slots, slots, facts) & (slots < canvas.slots)[:, None] | _self(slots)
    held = _held(slots, members, canvas, store)
    place = torch.arange(canvas.slots + 1, device=slots.device)[None].expand(len(members), -1)
    bins = (slots == canvas.slots)[..., None] & (place == canvas.slots)[:, None]
    return held[:, None] & _rule(slots, place, facts) | bins


def _held(slots: Tensor, members: Tensor, canvas: Canvas, store: KVStore) -> Tensor:
    """Slots that can be read: in the store already or computed now, and not behind the end. bool [m, L + 1]."""
    held = store.present[members].scatter(1, slots, True)
    return held & F.pad(canvas.used[members], (0, 1))


def _rule(queries: Tensor, keys: Tensor, facts: TextFacts) -> Tensor:
    """What the model's own mask allows between slots: bool [m, N, keys]."""
    if facts.block is None:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=queries.device)
    return (queries // facts.block)[..., None] >= (keys // facts.block)[:, None]


def _self(slots: Tensor) -> Tensor:
    return torch.eye(slots.shape[1], dtype=torch.bool, device=slots.device)[None]
