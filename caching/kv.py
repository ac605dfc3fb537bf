"""Which tokens of a text are computed again at a step, and whose keys and values are taken from earlier.

Windows are here; other ideas have files of their own: `kv_front.py` (what lies behind is never computed again),
`kv_scattered.py` (slots that do not stand together), `kv_suffix.py` (few of what follows), `kv_values.py` and `kv_attention.py` (other tokens in other layers), `kv_rollout.py` (where attention flows to).

Shapes: B texts, L slots, m of the texts in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.depth import Depth
from hasten.caching.store import Keep, KVStore
from hasten.canvas import Canvas, Row, TextFacts
from hasten.recipe import KVPolicy


@dataclass(slots=True)
class Rows:
    """What one call of the model computes.

    members: numbers of the texts. tokens bool [m, L]: the slots to compute. width: at least as many as any text has of
    them, known to the host. keep: see `Pass`. runs: in how many stretches they stand at most; a model with shifted logits
    computes one token more in front of each, unless runs is 0: then `tokens` is final. stretch: first and one past the last
    of the slots, int64 [m] each, where they stand together. full: every text of the call fills its canvas to the end;
    whole: and all of its slots are computed. depth: what a policy that computes other tokens in other layers does during the call.
    """

    members: list[int]
    tokens: Tensor
    width: int
    keep: Keep = "store"
    runs: int = 1
    stretch: tuple[Tensor, Tensor] | None = None
    full: bool = False
    whole: bool = False
    depth: Depth | None = None

    def only(self, which: list[int]) -> Rows:
        """The same call on some of its texts, given by their place in `members`."""
        assert self.depth is None, "a call that differs from layer to layer cannot be split"
        index = torch.tensor(which, device=self.tokens.device)
        stretch = None if self.stretch is None else (self.stretch[0][index], self.stretch[1][index])
        return replace(self, members=[self.members[i] for i in which], tokens=self.tokens[index], stretch=stretch)


class TokenKV(KVPolicy):
    """Base of the policies for texts that are written in any order; `start()` gives the state for one generation.

    exact: its output equals full recomputation on the models that it accepts. layered: it computes other tokens in other
    layers, so the model's layers have to be reached.
    """

    exact: ClassVar[bool] = False
    layered: ClassVar[bool] = False

    @property
    def steady(self) -> bool:
        """In a block, after its first evaluation, what is computed and what that reads depends neither on how many
        evaluations there were nor on what was written meanwhile; and nothing of it is read later. Then drafts can be
        verified with it: they stand for evaluations that are left out."""
        return False

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        """State of one generation. Raises `RefusedError` on a model for which it cannot be right."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class TokenKVState:
    """The state of a `TokenKV`. What it decides for a text must not depend on the others of the batch.

    ahead: the policy wants to know which slots are written in this many evaluations after one that it names
    (`asked`, `rank`); 0: it does not.
    """

    ahead: int = 0

    def tell(self, canvas: Canvas) -> Tensor | None:
        """Numbers that `plan` will need as `Row.told`, int64 [B, n]: they come to the host with the step's one look."""
        return None

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        """The calls of this step: every open text is a member of exactly one."""
        raise NotImplementedError(f"{type(self).__name__} has no plan().")

    def seen(self, done: Rows, canvas: Canvas) -> None:
        """One of them is over."""

    def rank(self, rank: Tensor, count: Tensor, canvas: Canvas) -> None:
        """After the calls, before slots are written: how sure each slot is (float32 [B, L], -inf where nothing is known),
        and how many the commit rule is going to write in this evaluation and the next `ahead` ones (int64 [B])."""

    def sure(self, confidence: Tensor, canvas: Canvas) -> None:
        """After the calls, before slots are written: the probability of the token that would be written into each slot,
        float32 [B, L]; NaN where this step's evaluations said nothing."""

    def changed(self, written: Tensor, erased: Tensor, canvas: Canvas) -> None:
        """These slots (bool [B, L]) have been written; those have become masks again or got another token.

        A slot whose token was taken back must not be read from the store as it is.
        """

    @property
    def bytes(self) -> int:
        """Bytes held besides the store."""
        return 0


class Recompute(TokenKV):
    """Everything at every step: no cache."""

    kind: ClassVar[str] = "recompute"
    exact: ClassVar[bool] = True

    @property
    def steady(self) -> bool:
        return True

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return _RecomputeState()


class _RecomputeState(TokenKVState):
    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        return stretches(canvas, rows, {text: (0, row.end) for text, row in enumerate(rows) if row.open}, "none")


class Prefix(TokenKV):
    """All at the first step of a block, then the block and what follows it (Fast-dLLM, arXiv 2505.22618, prefix cache).

    every: all again at every so many steps of a block, too (dInfer's `cache_update_freq`); None: only at its first.
    """

    kind: ClassVar[str] = "prefix"
    every: int | None = Field(None, ge=1)

    @property
    def steady(self) -> bool:
        return self.every is None

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return WindowState(facts, every=self.every, after=None)


class Dual(TokenKV):
    """All at the first step of a block, then the block alone: what follows it is frozen, too (Fast-dLLM, dual cache).

    every: as in `Prefix`.
    """

    kind: ClassVar[str] = "dual"
    every: int | None = Field(None, ge=1)

    @property
    def steady(self) -> bool:
        return self.every is None

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return WindowState(facts, every=self.every)


class Vicinity(TokenKV):
    """All at the first step of a block, then the block with its neighbours: [low - before, high + after) (dInfer,
    arXiv 2510.08666, vicinity refresh).

    warmup: the first steps of a text, all of which compute everything. every: as in `Prefix`. Defaults are dInfer's.
    """

    kind: ClassVar[str] = "vicinity"
    before: int = Field(16, ge=0)
    after: int = Field(16, ge=0)
    warmup: int = Field(4, ge=0)
    every: int | None = Field(None, ge=1)

    @property
    def steady(self) -> bool:
        return self.every is None and self.warmup == 0

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return WindowState(facts, before=self.before, after=self.after, warmup=self.warmup, every=self.every)


class WindowState(TokenKVState):
    """All slots when `row` says so, else those around the active block.

    What is written or taken back lies in the active block, which every call computes: nothing stale is ever read.
    """

    def __init__(
        self, facts: TextFacts, *, before: int = 0, after: int | None = 0, warmup: int = 0, every: int | None = None
    ) -> None:
        self.grain, self.before, self.after = facts.block or 1, before, after
        self.warmup, self.every = warmup, every

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        return stretches(canvas, rows, {text: self._stretch(row) for text, row in enumerate(rows) if row.open})

    def _stretch(self, row: Row) -> tuple[int, int]:
        again = row.since == 0 if self.every is None else row.since % self.every == 0
        if again or row.step < self.warmup:
            return 0, row.end
        # prompt tokens in the first block of a block-causal model see it
        low = max(0, row.low - self.before) // self.grain * self.grain
        return low, row.end if self.after is None else min(row.end, row.high + self.after)


def stretches(
    canvas: Canvas, rows: Sequence[Row], spans: dict[int, tuple[int, int]], keep: Keep = "store"
) -> list[Rows]:
    """The calls that compute, of each text, the slots [first, last)."""
    widths = {text: last - first for text, (first, last) in spans.items()}
    return [_stretch(canvas, rows, members, spans, keep) for members in alike(widths)]


def alike(widths: dict[int, int]) -> list[list[int]]:
    """Texts that share a call: none with less than half of another's slots, to whose number it would be padded."""
    groups: list[list[int]] = []
    for text in sorted(widths, key=lambda text: -widths[text]):
        if groups and 2 * widths[text] >= widths[groups[-1][0]]:
            groups[-1].append(text)
        else:
            groups.append([text])
    return [sorted(group) for group in groups]


def _stretch(
    canvas: Canvas, rows: Sequence[Row], members: list[int], spans: dict[int, tuple[int, int]], keep: Keep
) -> Rows:
    bounds = torch.tensor([spans[text] for text in members], device=canvas.ids.device)
    first, last = bounds.unbind(1)
    tokens = (canvas.place >= first[:, None]) & (canvas.place < last[:, None])
    full = all(rows[text].end == canvas.slots for text in members)
    whole = full and all(spans[text] == (0, canvas.slots) for text in members)
    width = max(spans[text][1] - spans[text][0] for text in members)
    return Rows(members, tokens, width, keep, stretch=(first, last), full=full, whole=whole)
