"""Which tokens of a text are computed again at a step, and whose keys and values are taken from earlier.

Shapes: B texts, L slots, m of the texts in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.caching.store import Keep, KVStore
from hasten.canvas import Canvas, Row, TextFacts
from hasten.recipe import KVPolicy


@dataclass(slots=True)
class Rows:
    """What one call of the model computes. members: numbers of the texts. tokens bool [m, L]: the slots to compute.
    width: at least as many as any text has of them, known to the host. keep: see `Pass`. runs: in how many stretches they stand at most (a
    model with shifted logits computes one token more for each). depth: what a policy that
    computes other tokens in other layers tells its seam."""

    members: list[int]
    tokens: Tensor
    width: int
    keep: Keep = "store"
    runs: int = 1
    depth: Any = field(default=None)

    def only(self, which: list[int]) -> Rows:
        """The same call on some of its texts, given by their place in `members`."""
        index = torch.tensor(which, device=self.tokens.device)
        return replace(self, members=[self.members[i] for i in which], tokens=self.tokens[index])


class TokenKV(KVPolicy):
    """Base of the policies for texts that are written in any order; `start()` gives the state for one generation.

    exact: its output equals full recomputation on the models that it accepts.
    """

    exact: ClassVar[bool] = False

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        """State of one generation. Raises `RefusedError` on a model for which it cannot be right."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class TokenKVState:
    """The state of a `TokenKV`. What it decides for a text must not depend on the others of the batch."""

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        """The calls of this step: every open text is a member of exactly one."""
        raise NotImplementedError(f"{type(self).__name__} has no plan().")

    def seen(self, done: Rows, canvas: Canvas) -> None:
        """One of them is over."""

    def changed(self, written: Tensor, erased: Tensor, canvas: Canvas) -> None:
        """These slots (bool [B, L]) have been written; those have become masks again or got another token.

        A slot whose token was taken back must not be read from the store as it is.
        """


class Recompute(TokenKV):
    """Everything at every step: no cache."""

    kind: ClassVar[str] = "recompute"
    exact: ClassVar[bool] = True

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return _RecomputeState()


class _RecomputeState(TokenKVState):
    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        members = [number for number, row in enumerate(rows) if row.open]
        return [whole(canvas, members, rows, "none")]


class Prefix(TokenKV):
    """All at the first step of a block, then the block and what follows it (Fast-dLLM, arXiv 2505.22618, prefix cache)."""

    kind: ClassVar[str] = "prefix"
    suffix: ClassVar[bool] = True

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return _WindowState(facts, self.suffix)


class Dual(Prefix):
    """All at the first step of a block, then the block alone: what follows it is frozen, too (Fast-dLLM, dual cache)."""

    kind: ClassVar[str] = "dual"
    suffix: ClassVar[bool] = False


class _WindowState(TokenKVState):
    def __init__(self, facts: TextFacts, suffix: bool) -> None:
        self.grain, self.suffix = facts.block or 1, suffix

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        fresh = [number for number, row in enumerate(rows) if row.open and row.since == 0]
        going = [number for number, row in enumerate(rows) if row.open and row.since > 0]
        calls = [whole(canvas, fresh, rows)] if fresh else []
        if going:
            chosen = torch.tensor(going, device=canvas.ids.device)
            low, high = canvas.span[chosen].unbind(1)
            low = low // self.grain * self.grain  # prompt tokens in the first block of a block-causal model see it
            tokens = canvas.take(chosen).inside(low, canvas.end[chosen] if self.suffix else high)
            width = max((rows[number].end if self.suffix else rows[number].high) - rows[number].low for number in going)
            width += self.grain - 1
            calls.append(Rows(going, tokens, width))
        return calls


def whole(canvas: Canvas, members: list[int], rows: Sequence[Row], keep: Keep = "store") -> Rows:
    """A call on all slots of these texts."""
    chosen = torch.tensor(members, device=canvas.ids.device)
    return Rows(members, canvas.used[chosen], max(rows[number].end for number in members), keep)
