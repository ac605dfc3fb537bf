"""Slots that do not stand together are computed again: those that have just changed, or those that are written next.

Shapes: B texts, L slots, m of the texts in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hasten.caching.kv import Rows, TokenKV, TokenKVState, alike, stretches
from hasten.caching.store import KVStore
from hasten.canvas import Canvas, Row, TextFacts


class Delayed(TokenKV):
    """A token's keys are kept from the step after the one that wrote it; masks are always computed (dKV-Cache, arXiv
    2505.15781).

    The keys of a token are still those of a mask in the step that writes it, so it is computed once more in the next.
    every: all again at every so many steps (the authors' 4 or 8), None: only at the first. reach None: all masks of the text (dKV-Cache-Decode);
    a number: of the masks only those of the active block, and what stands within so many slots of what was just written
    (dKV-Cache-Greedy; there around the slot that is written next, too, which is known only where the order is).
    """

    kind: ClassVar[str] = "delayed"
    every: int | None = Field(8, ge=1)
    reach: int | None = Field(None, ge=0)

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return _DelayedState(facts, self)


class Groups(TokenKV):
    """The slots that the next evaluations will write are chosen in one that computes everything; the others compute them
    alone (ReCAP, arXiv 2505.19089, for masked images).

    An evaluation of all slots ranks them; the group is as many of the first as the commit rule writes in it and in the
    `local` evaluations after it, which compute the group, read the keys of the rest, and can write only into the group.
    local 0: every evaluation computes everything. full: the first evaluations of a text, which all do. Defaults: the authors' for 16 evaluations. It is
    `Dual` with a set of slots instead of a block. Wants a commit rule that knows its numbers beforehand (a quota).
    """

    kind: ClassVar[str] = "groups"
    local: int = Field(1, ge=0)
    full: int = Field(8, ge=0)

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return _GroupsState(facts, self)


class ScatteredState(TokenKVState):
    """Calls on a set of slots of each text, or on all; subclasses say which.

    stale bool [B, L]: slots whose keys are not those of the token that stands there; they are always among the set.
    """

    def __init__(self, facts: TextFacts) -> None:
        self.shifted = facts.shifted
        self.stale: Tensor | None = None
        self.tokens: Tensor | None = None

    def choose(self, canvas: Canvas, stale: Tensor) -> Tensor:
        """Slots to compute where not all are, bool [B, L]."""
        raise NotImplementedError(f"{type(self).__name__} has no choose().")

    def again(self, text: int, row: Row) -> bool:
        """Is everything of this text computed now? Asked once per step."""
        raise NotImplementedError(f"{type(self).__name__} has no again().")

    def tell(self, canvas: Canvas) -> Tensor | None:
        if self.stale is None:
            self.stale = torch.zeros_like(canvas.masked)
        tokens = self.choose(canvas, self.stale) | self.stale
        if self.shifted:  # what is written into a slot comes out of the one before
            tokens = tokens | F.pad(tokens & canvas.eligible, (0, 1))[:, 1:]
        self.tokens = tokens & canvas.used
        return self.tokens.sum(1, keepdim=True)

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        tokens = self.tokens
        assert tokens is not None
        opened = [text for text, row in enumerate(rows) if row.open]
        whole = [text for text in opened if self.again(text, rows[text]) or rows[text].told[0] == 0]
        calls = stretches(canvas, rows, {text: (0, rows[text].end) for text in whole})
        for members in alike({text: rows[text].told[0] for text in opened if text not in whole}):
            width = max(rows[text].told[0] for text in members)
            full = all(rows[text].end == canvas.slots for text in members)
            calls.append(Rows(members, tokens[torch.tensor(members, device=tokens.device)], width, runs=0, full=full))
        return calls

    def seen(self, done: Rows, canvas: Canvas) -> None:
        if done.keep == "store" and self.stale is not None:
            self.stale[torch.tensor(done.members, device=self.stale.device)] = False

    def changed(self, written: Tensor, erased: Tensor, canvas: Canvas) -> None:
        assert self.stale is not None
        self.stale = self.stale | written | erased


class _DelayedState(ScatteredState):
    def __init__(self, facts: TextFacts, policy: Delayed) -> None:
        super().__init__(facts)
        self.policy = policy

    def again(self, text: int, row: Row) -> bool:
        every = self.policy.every
        return row.step == 0 or every is not None and row.step % every == 0

    def choose(self, canvas: Canvas, stale: Tensor) -> Tensor:
        reach = self.policy.reach
        if reach is None:
            return canvas.masked
        near = F.max_pool1d(stale[:, None].float(), 2 * reach + 1, stride=1, padding=reach)[:, 0] > 0
        return canvas.eligible | near


class _GroupsState(ScatteredState):
    """group bool [B, L]; left: of each text, the evaluations of its group that are still to come."""

    def __init__(self, facts: TextFacts, policy: Groups) -> None:
        super().__init__(facts)
        self.policy, self.ahead = policy, policy.local
        self.group: Tensor | None = None
        self.left: dict[int, int] = {}
        self.chosen: list[int] = []

    def choose(self, canvas: Canvas, stale: Tensor) -> Tensor:
        if self.group is None:
            self.group = torch.zeros_like(stale)
        return self.group

    def tell(self, canvas: Canvas) -> Tensor | None:
        count = super().tell(canvas)
        assert count is not None and self.group is not None
        return torch.cat([count, (self.group & canvas.eligible).sum(1, keepdim=True)], 1)

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        self.chosen = []
        return super().plan(canvas, rows)

    def again(self, text: int, row: Row) -> bool:
        if self.left.get(text, 0) > 0 and row.told[1] > 0:
            self.left[text] -= 1
            return False
        if row.step >= self.policy.full:
            self.left[text] = self.policy.local
            self.chosen.append(text)
        return True

    def rank(self, rank: Tensor, count: Tensor, canvas: Canvas) -> None:
        assert self.group is not None
        fresh = torch.zeros(len(rank), dtype=torch.bool)
        fresh[self.chosen] = True
        eligible = canvas.eligible
        order = torch.where(eligible, rank, -float("inf")).argsort(dim=1, descending=True, stable=True)
        first = eligible & (order.argsort(dim=1) < count[:, None])
        self.group = torch.where(fresh.to(rank.device)[:, None], first, self.group)
