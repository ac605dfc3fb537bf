"""Who reads along while texts are written: streamers and stopping criteria, in transformers' protocols.

Tokens are handed on when they are final: when all before them is written, and with a reviser when their block is
finished. Both get host copies that come with the one look per step, so nothing waits for the device a second time.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.canvas import DONE, Row
from hasten.errors import UsageError

Criterion = Callable[[Tensor, Any], Any]
"""transformers' `StoppingCriteria`: of ids int64 [1, n] and None, whether the text is over; bool, or a tensor of one."""


class Reader:
    """Reads along with a generation. Pass it as `on_look` to the loop.

    streamers: one for each text, or none. criteria: a text ends at the first token at which one of them says so. frozen:
    written tokens can still change within the active block.
    """

    def __init__(self, prompts: Sequence[Tensor], streamers: Sequence[Any], criteria: Sequence[Criterion], frozen: bool) -> None:
        self.streamers, self.criteria, self.frozen = list(streamers), list(criteria), frozen
        self.told = [len(prompt) for prompt in prompts]
        self.ended = [False] * len(prompts)
        for streamer, prompt in zip(self.streamers, prompts, strict=False):
            streamer.put(prompt[None])

    def __call__(self, rows: list[Row], ids: Tensor, status: Tensor) -> dict[int, int]:
        """Hand on what is new; gives the texts that are over by a criterion, and one past their last slot."""
        over = {}
        for number, row in enumerate(rows):
            if self.ended[number]:
                continue
            upto = self._final(row, status[number])
            stop = self._stops(ids[number], self.told[number], upto)
            if stop is not None:
                upto = stop
                if row.open or stop < row.end:
                    over[number] = stop
            self._tell(number, ids[number], upto, row.open and stop is None, row.end)
        return over

    def _final(self, row: Row, status: Tensor) -> int:
        """One past the last slot that is final and has only such slots before it."""
        open_slots = (status[row.start : row.end] != DONE).nonzero()
        written = row.start + int(open_slots[0]) if len(open_slots) else row.end
        return min(written, max(row.low, row.start)) if self.frozen and row.open else written

    def _stops(self, ids: Tensor, told: int, upto: int) -> int | None:
        """One past the token at which the first criterion ends the text; None where none does."""
        if not self.criteria:
            return None
        for end in range(told + 1, upto + 1):  # as if the tokens had come one by one
            if any(bool(torch.as_tensor(criterion(ids[None, :end], None)).all()) for criterion in self.criteria):
                return end
        return None

    def _tell(self, number: int, ids: Tensor, upto: int, more: bool, end: int) -> None:
        streamer = self.streamers[number] if self.streamers else None
        if streamer is not None and upto > self.told[number]:
            streamer.put(ids[self.told[number] : upto])
        self.told[number] = max(upto, self.told[number])
        if more:
            if streamer is not None and hasattr(streamer, "put_draft"):
                streamer.put_draft(value=ids[None, self.told[number] : end])
            return
        self.ended[number] = True
        if streamer is not None:
            streamer.end()

    def close(self) -> None:
        """End the streams that are still open: the generation was stopped."""
        for number, streamer in enumerate(self.streamers):
            if not self.ended[number]:
                self.ended[number] = True
                streamer.end()


def streamers(given: Any, texts: int) -> list[Any]:
    """A streamer for each text, checked. One streamer is for one text, because texts of a batch are written side by side."""
    if given is None:
        return []
    found = list(given) if isinstance(given, list | tuple) else [given]
    if len(found) != texts:
        raise UsageError(
            f"There are {texts} texts and {len(found)} streamers. Texts of a batch are written side by side, so pass a list with"
            " a streamer for each."
        )
    for streamer in found:
        if not callable(getattr(streamer, "put", None)) or not callable(getattr(streamer, "end", None)):
            raise UsageError(f"{type(streamer).__name__} is no streamer: it must have put(ids) and end().")
        if getattr(streamer, "_takes_logits", False):
            raise UsageError(
                f"{type(streamer).__name__} wants the logits of each draft, which are never kept for all slots. Take one that"
                " wants tokens."
            )
    return found


def criteria(given: Any) -> list[Criterion]:
    """Stopping criteria as a list, checked."""
    if given is None:
        return []
    found = [given] if callable(given) and not isinstance(given, list) else list(given)
    for criterion in found:
        if not callable(criterion):
            raise UsageError(f"stopping_criteria are callables (input_ids, scores) -> bool, got {criterion!r}.")
    return found
