"""Masks far behind the active block say little but how long the text is to be: most of them are left out altogether.

Shapes: B texts, L slots, m of the texts in one call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.kv import Rows, TokenKV, TokenKVState, alike
from hasten.caching.store import KVStore
from hasten.canvas import Canvas, Row, TextFacts


class SparseSuffix(TokenKV):
    """`Prefix` with few slots behind the block: near ones, and ever fewer farther on (DPad, arXiv 2508.14148).

    Of the slots at distance d behind the block, a share exp(-(decay d / window)^2 / 2) is computed and read, of those
    beyond `window` none; the others do not exist for the model until the block comes nearer. Which ones is fixed by d
    alone, evenly spread (the authors draw them once per block), so that texts do not depend on each other.
    """

    kind: ClassVar[str] = "sparse-suffix"
    window: int = Field(128, ge=0)
    decay: float = Field(3.0, ge=0)

    @property
    def steady(self) -> bool:
        return True

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return _SuffixState(self, facts, store)


class _SuffixState(TokenKVState):
    """kept: whether the slot at distance d is, for d = 0, 1, ...; sums: how many of the first d are."""

    def __init__(self, policy: SparseSuffix, facts: TextFacts, store: KVStore) -> None:
        self.store, self.grain = store, facts.block or 1
        total, kept, self.sums = 0.0, [False] * store.slots, [0]
        for d in range(store.slots):
            before = math.floor(total + 0.5)
            total += math.exp(-((policy.decay * d / max(1, policy.window)) ** 2) / 2) if d < policy.window else 0.0
            kept[d] = math.floor(total + 0.5) > before
            self.sums.append(self.sums[-1] + kept[d])
        self.kept = torch.tensor([*kept, False], device=store.present.device)

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        calls = []
        for fresh in (True, False):
            mine = {text: row for text, row in enumerate(rows) if row.open and (row.since == 0) == fresh}
            first = {text: 0 if fresh else row.low // self.grain * self.grain for text, row in mine.items()}
            widths = {text: row.high - first[text] + self.sums[row.end - row.high] for text, row in mine.items()}
            for members in alike(widths):
                tokens = self._tokens(canvas, [first[text] for text in members], [mine[text].high for text in members])
                tokens &= canvas.used[torch.tensor(members, device=tokens.device)]
                if fresh:
                    self._forget(members, tokens)
                most = max(self.sums[mine[text].end - mine[text].high] for text in members)
                calls.append(Rows(members, tokens, max(widths[text] for text in members), runs=1 + most))
        return calls

    def _tokens(self, canvas: Canvas, first: list[int], high: list[int]) -> Tensor:
        place = canvas.place
        low, top = torch.tensor([first, high], device=place.device)[..., None]
        distance = torch.where(place >= top, place - top, canvas.slots)
        tokens: Tensor = (place >= low) & (place < top) | self.kept[distance]
        return tokens

    def _forget(self, members: list[int], tokens: Tensor) -> None:
        """What is not computed at the first step of a block is not read in it."""
        gone = torch.zeros_like(self.store.present[:, :-1])
        gone[torch.tensor(members, device=gone.device)] = ~tokens
        self.store.forget(gone)
