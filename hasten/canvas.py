"""Texts that are written in any order: the state on which samplers and caches decide.

Shapes: B texts, L slots. Slot i of a text is its position i: the prompt first, what is generated directly behind it,
nothing (`PAD`) after that. Texts of a batch may be of different lengths and in different blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

PROMPT, MASK, DONE, PAD = 0, 1, 2, 3
"""What stands in a slot: given, still to be written, written, nothing (no query and no key ever)."""


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What the engine must know of a masked language model.

    layers, vocab, context: numbers of attention layers, of logits and of positions at most. mask_id: the token that says
    "not written yet" (None: uniform noise instead of masks). eos_ids: tokens that end a text. pad_id: what is put behind
    it. forbidden: tokens that are never written, `mask_id` among them. shifted: the logits at slot i are those of slot
    i + 1. block: slots per block of a block-causal model (a query sees its own block and those before), None where every
    query sees all.
    """

    layers: int
    vocab: int
    mask_id: int | None
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    forbidden: tuple[int, ...] = ()
    shifted: bool = False
    block: int | None = None
    context: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """One text as the host knows it, in slots: the generated part [start, end) and the active block [low, high).

    outer_low, outer_high: the block of the model or of the caches that the active one lies in. left, masks: slots that are
    not written yet, in the block and in all. begun: of the block when it began. step, since: evaluations so far, in all
    and in this block. drafts: how many drafts of it are worth an evaluation, with the text as it stands. open: there is
    still work to do. told: what else the host asked to read along (`Canvas.look`).
    """

    start: int
    end: int
    low: int
    high: int
    outer_low: int
    outer_high: int
    left: int
    masks: int
    begun: int
    step: int
    since: int
    drafts: int
    open: bool
    told: tuple[int, ...] = ()


@dataclass(slots=True)
class Canvas:
    """A batch of texts that are being written.

    ids int64 [B, L]; status uint8 [B, L] (`PROMPT`, `MASK`, `DONE`, `PAD`); start, end int64 [B]; span int64 [B, 2]: the
    active block; outer int64 [B, 2]: the block that it is a part of, the same one unless blocks are nested; begun
    int64 [B]: masks it began with; step, since int64 [B]: evaluations in all and in this block (with drafts: those that
    sequential decoding would have made); drafts int64 [B]: how many drafts the next evaluation of a text is to check,
    the text itself among them; committed int32 [B, L]: the step at which a slot was written, -1 where it was not;
    confidence float32 [B, L]: the probability of its token then; open bool [B]: there is work left.
    """

    ids: Tensor
    status: Tensor
    start: Tensor
    end: Tensor
    span: Tensor
    outer: Tensor
    begun: Tensor
    step: Tensor
    since: Tensor
    drafts: Tensor
    committed: Tensor
    confidence: Tensor
    open: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Tensor], new: Sequence[int], facts: TextFacts, device: torch.device | None = None) -> Self:
        """A canvas for `prompts` (int64 [P_b] each), behind each of which `new[b]` slots are to be written."""
        starts = torch.tensor([len(prompt) for prompt in prompts])
        ends = starts + torch.tensor(list(new))
        rows, slots = len(prompts), int(ends.max())
        place = torch.arange(slots)
        ids = torch.full((rows, slots), facts.pad_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        written, inside = place < starts[:, None], place < ends[:, None]
        status = torch.where(written, PROMPT, torch.where(inside, MASK, PAD)).to(torch.uint8)
        if facts.mask_id is not None:
            ids[status == MASK] = facts.mask_id
        zeros, none = torch.zeros(rows, dtype=torch.int64), torch.stack([starts, starts], 1)
        made = cls(
            ids, status, starts, ends, none, none.clone(), zeros, zeros.clone(), zeros.clone(), zeros + 1,
            torch.full((rows, slots), -1, dtype=torch.int32), torch.full((rows, slots), float("nan")), ends > starts,
        )  # fmt: skip
        return made.to(device) if device is not None else made

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def take(self, rows: Tensor) -> Self:
        """The texts `rows` (int64 [n], repeats allowed): copies, so a draft can be written into them."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    # --- where things stand, bool [B, L] ------------------------------------------------------------

    @property
    def slots(self) -> int:
        """L."""
        return self.ids.shape[1]

    @property
    def place(self) -> Tensor:
        """Slot numbers, int64 [L]."""
        return torch.arange(self.slots, device=self.ids.device)

    @property
    def masked(self) -> Tensor:
        """Slots that are still to be written."""
        return self.status == MASK

    @property
    def used(self) -> Tensor:
        """Slots in which something stands or will stand: those that are queries and keys."""
        return self.status != PAD

    @property
    def active(self) -> Tensor:
        """Slots of the active blocks of the open texts."""
        return self.inside(self.span[:, 0], self.span[:, 1]) & self.open[:, None]

    @property
    def eligible(self) -> Tensor:
        """Slots that may be written now."""
        return self.masked & self.active

    def inside(self, low: Tensor, high: Tensor) -> Tensor:
        """Slots in [low, high), int64 [B] each."""
        place = self.place
        return (place >= low[:, None]) & (place < high[:, None])

    # --- changes ------------------------------------------------------------------------------------

    def write(self, chosen: Tensor, token: Tensor, confidence: Tensor) -> None:
        """Put `token` into the slots `chosen` (bool [B, L]); all [B, L]."""
        self.ids = torch.where(chosen, token, self.ids)
        self.status = torch.where(chosen, DONE, self.status).to(torch.uint8)
        self.committed = torch.where(chosen, self.step[:, None].to(torch.int32), self.committed)
        self.confidence = torch.where(chosen, confidence, self.confidence)

    def erase(self, chosen: Tensor, mask_id: int) -> None:
        """Make the slots `chosen` masks again."""
        self.ids = torch.where(chosen, mask_id, self.ids)
        self.status = torch.where(chosen, MASK, self.status).to(torch.uint8)
        self.committed = torch.where(chosen, -1, self.committed)

    def cut(self, end: Tensor, pad_id: int) -> None:
        """End the texts at `end` (int64 [B]): what lies behind becomes nothing."""
        end = torch.minimum(end, self.end)
        gone = (self.place >= end[:, None]) & (self.status != PROMPT)
        self.ids = torch.where(gone, pad_id, self.ids)
        self.status = torch.where(gone, PAD, self.status).to(torch.uint8)
        self.end, self.span = end, torch.minimum(self.span, end[:, None])
        self.outer = torch.minimum(self.outer, end[:, None])

    def move(self, rows: Tensor, span: Tensor, outer: Tensor | None = None) -> None:
        """The active block of the texts `rows` (bool [B]) is now `span`, a part of `outer` (int64 [B, 2] each; None: all
        of it); it goes on."""
        self.span = torch.where(rows[:, None], span, self.span)
        self.outer = torch.where(rows[:, None], span if outer is None else outer, self.outer)

    def enter(self, rows: Tensor, span: Tensor, outer: Tensor | None = None) -> None:
        """As `move`, but the block is a new one."""
        self.move(rows, span, outer)
        self.begun = torch.where(rows, (self.masked & self.inside(self.span[:, 0], self.span[:, 1])).sum(1), self.begun)
        self.since = torch.where(rows, 0, self.since)

    def look(self, told: Tensor | None = None) -> list[Row]:
        """Where each text stands, as host numbers. The one thing per step that waits for the device.

        told: more numbers, int64 [B, n], that are to come along as `Row.told`.
        """
        return _rows(self._table(told).tolist())

    def read(self, told: Tensor | None = None) -> tuple[list[Row], Tensor, Tensor]:
        """`look`, and in the same copy ids int64 [B, L] and status uint8 [B, L] on the host: for who reads along."""
        table = self._table(told)
        words = torch.cat([table, self.ids, self.status.long()], 1).cpu()
        rows, ids, status = torch.split(words, [table.shape[1], self.slots, self.slots], 1)
        return _rows(rows.tolist()), ids, status.to(torch.uint8)

    def _table(self, told: Tensor | None) -> Tensor:
        """The fields of `Row` as int64 [B, 13 + n]."""
        left, masks = self.eligible.sum(1), self.masked.sum(1)
        table = [self.start, self.end, *self.span.unbind(1), *self.outer.unbind(1), left, masks, self.begun]
        stack = torch.stack([*table, self.step, self.since, self.drafts, self.open.long()], 1)
        return stack if told is None else torch.cat([stack, told], 1)


def _rows(table: list[list[Any]]) -> list[Row]:
    return [Row(*[*row[:12], bool(row[12]), tuple(row[13:])]) for row in table]
