"""The rows of one call of `generate`: what is written, who is finished, and what a streamer may see.

Rows write different numbers of tokens in a round, so each has its own length here. Ends are looked for token by token, in
the order in which `generate` would have written them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.pipelines.decode import compat


class Rows:
    """The texts of one call.

    ids, mask int64 [B, P]: the prompts with their padding. criteria: transformers' list. pad: id behind a finished row, None
    where rows write on until all are finished. streamer: transformers' streamer, or None.

    texts: tokens without padding. written: new tokens of each row. done: how many of them stand where a criterion ended the
    row, None before.
    """

    def __init__(self, ids: Tensor, mask: Tensor, criteria: Any, pad: int | None, streamer: Any) -> None:
        self.ids, self.device, self.pad, self.streamer = ids, ids.device, pad, streamer
        self.width = ids.shape[1]
        self.padded = ids.tolist()
        self.texts = [[token for token, here in zip(row, seen, strict=True) if here] for row, seen in zip(self.padded, mask.tolist(), strict=True)]
        self.written: list[list[int]] = [[] for _ in self.padded]
        self.done: list[int | None] = [None] * len(self.padded)
        self._open = len(self.padded)
        length, ends, self.others = compat.fixed_ends(criteria)
        self.limit = length
        self.ends = frozenset(ends)
        self.shown = 0
        self.scores: list[list[Tensor]] | None = None
        if streamer is not None:
            streamer.put(ids.cpu())

    @property
    def count(self) -> int:
        return len(self.written)

    @property
    def over(self) -> bool:
        """Is there nothing left to write?"""
        return not any(self.active)

    @property
    def active(self) -> list[bool]:
        """Rows that still write."""
        most = self._goal
        return [self._writes(row, most) for row in range(self.count)]

    @property
    def room(self) -> list[int]:
        """Tokens that each row may still write."""
        most = self._goal
        return [most - len(row) for row in self.written]

    @property
    def _goal(self) -> int:
        """New tokens of a row at most. Where rows write on (`pad` None), all go on to the length of the longest."""
        return self._most if self.pad is not None or self._open else self.length

    def _writes(self, row: int, most: int) -> bool:
        return len(self.written[row]) < most and (self.pad is None or self.done[row] is None)

    @property
    def length(self) -> int:
        """New columns of the result so far: of the longest row that is finished, or of all while one is not."""
        return max(len(row) if done is None else done for row, done in zip(self.written, self.done, strict=True))

    @property
    def level(self) -> int | None:
        """New tokens of the rows that still write, where they all have as many; None where they have not."""
        found = {len(row) for row, active in zip(self.written, self.active, strict=True) if active}
        return found.pop() if len(found) == 1 else None

    @property
    def _most(self) -> int:
        return (1 << 60) if self.limit is None else self.limit - self.width

    def write(self, row: int, tokens: list[int]) -> int:
        """Write `tokens` until the row ends or is full; returns how many were written."""
        for number, token in enumerate(tokens):
            if not self._writes(row, self._goal):
                return number
            self.written[row].append(token)
            self.texts[row].append(token)
            if self.done[row] is None and self._ends(row, token):
                self.done[row] = len(self.written[row])
                self._open -= 1
        return len(tokens)

    def _ends(self, row: int, token: int) -> bool:
        ended = token in self.ends or len(self.written[row]) >= self._most
        if not self.others:
            return ended
        ids = self.so_far(row)[None]
        scores = None if self.scores is None else tuple(step[None] for step in self.scores[row][: len(self.written[row])])
        # All are asked, also where one has said yes: they may count how often they are.
        return any([ended, *(bool(torch.as_tensor(each(ids, scores)).all()) for each in self.others)])

    def so_far(self, row: int) -> Tensor:
        """A row with its padding, int64 [L], as processors and criteria are shown it."""
        return torch.tensor(self.padded[row] + self.written[row], device=self.device)

    def stream(self) -> None:
        """Show the streamer the columns that all rows have reached, one at a time, as `generate` does."""
        if self.streamer is None:
            return
        open_ = [len(row) for row, done in zip(self.written, self.done, strict=True) if done is None]
        reached = min(open_, default=self.length)
        for column in range(self.shown, reached):
            self.streamer.put(torch.tensor([self._at(row, column) for row in self.written]))
        self.shown = max(self.shown, reached)

    def result(self) -> Tensor:
        """Prompts and new tokens, int64 [B, P + new]."""
        return self.columns(self.length)

    def columns(self, length: int) -> Tensor:
        """Prompts and the first `length` new columns, int64 [B, P + length], with padding behind finished rows."""
        new = [[self._at(row, column) for column in range(length)] for row in self.written]
        return torch.cat([self.ids, torch.tensor(new, device=self.device, dtype=self.ids.dtype).view(self.count, length)], 1)

    def _at(self, row: list[int], column: int) -> int:
        return row[column] if column < len(row) else self.pad or 0
