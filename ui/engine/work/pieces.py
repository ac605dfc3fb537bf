"""Tokens as readers see them: what each adds to the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BEFORE = 8
"""Tokens of the prompt that are decoded, too: how the first new one reads may depend on what stands before it."""

BROKEN = "\N{REPLACEMENT CHARACTER}"


class Pieces:
    """Words of one text's new tokens, which only grows. Joined they are the text, spaces included, whatever the tokenizer does at the beginning
    of a text. A character that takes several tokens stands with the last of them; the others are empty."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-BEFORE:])
        self._begin, self._read = 0, len(self._ids)
        self._words: list[str] = []

    def of(self, ids: Sequence[int]) -> list[str]:
        """The words of `ids`, of which those of the call before are the first."""
        for token in ids[len(self._words) :]:
            self._ids.append(int(token))
            before, whole = self._decoded(self._begin, self._read), self._decoded(self._begin, len(self._ids))
            if whole.endswith(BROKEN) or len(whole) <= len(before):
                self._words.append("")
                continue
            self._words.append(whole[len(before) :])
            self._begin, self._read = self._read, len(self._ids)
        return list(self._words)

    def _decoded(self, begin: int, end: int) -> str:
        found: str = self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return found
