"""A cache that computes again what is written and where the same token stands already.

Shapes: B texts, L slots, V tokens in the vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.kv import TokenKV, TokenKVState
from hasten.caching.kv_scattered import ScatteredState
from hasten.caching.store import KVStore
from hasten.canvas import MASK, Canvas, Row, TextFacts


class Echo(TokenKV):
    """Open slots of the active block, tokens just written, and where the text has these tokens already. Ours.

    A token that is written changes most what the model makes of its other occurrences: a letter of a list is used up, a
    name is defined, a bracket has found its partner. Caches that freeze the prompt lose that (on tiny-dllm, half of the
    answers to `shuffle`), and those that compute it again pay for all of it. Here its other occurrences are computed
    again together with the token itself, one step after it was written, as in dKV-Cache (`Delayed`).

    often: tokens that occur more often than this in a text are left out (spaces, commas, ends of text). every: all again
    at every so many steps; None: at the first only.
    """

    kind: ClassVar[str] = "echo"
    often: int = Field(4, ge=0)
    every: int | None = Field(None, ge=1)

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return _EchoState(facts, self)


class _EchoState(ScatteredState):
    def __init__(self, facts: TextFacts, policy: Echo) -> None:
        super().__init__(facts)
        self.policy, self.vocab = policy, facts.vocab

    def again(self, text: int, row: Row) -> bool:
        every = self.policy.every
        return row.step == 0 or every is not None and row.step % every == 0

    def choose(self, canvas: Canvas, stale: Tensor) -> Tensor:
        return canvas.eligible | self._echoes(canvas, stale)

    def _echoes(self, canvas: Canvas, stale: Tensor) -> Tensor:
        """Slots whose token is one of the stale slots' and not frequent, bool [B, L]."""
        ids = torch.where(canvas.used & (canvas.status != MASK), canvas.ids, self.vocab)
        count = torch.zeros(len(ids), self.vocab + 1, dtype=torch.int32, device=ids.device)
        often = count.scatter_add(1, ids, torch.ones_like(ids, dtype=torch.int32)) > self.policy.often
        fresh = torch.zeros_like(often).scatter(1, torch.where(stale, ids, self.vocab), True)
        meant = fresh & ~often
        meant[:, self.vocab] = False
        return meant.gather(1, ids)
