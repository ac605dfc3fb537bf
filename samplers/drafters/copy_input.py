"""Aggressive Decoding: copy the input, and find the place again where the text left it (arXiv 2205.10350)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import ClassVar, Literal

from pydantic import Field

from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill
from hasten.samplers.drafters.host_tree import HostState, HostTree


class Copy(Drafter):
    """Go on copying the prompt (input-guided decoding: corrections, edits, quotations).

    While the text equals the prompt from some place on, what follows there is drafted. When the model leaves it, the place is
    looked for again: where the last `longest` tokens stand in the prompt, else fewer, down to `shortest`, the nearest
    behind the old place first; else the model has put another token in place of one, or put one in. width: so many of these
    places, as branches of four tokens each. window: tokens behind the old place that are looked at first, and only then all of
    the prompt.

    Differs: the paper drafts all the rest of the input, and stops where its suffix is not unique.
    """

    kind: ClassVar[str] = "copy"
    nodes: int = Field(16, ge=1)
    longest: int = Field(4, ge=1)
    shortest: int = Field(1, ge=1)
    width: int = Field(2, ge=1)
    window: int = Field(32, ge=1)

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "chain" if self.width == 1 else "tree"

    def start(self, facts: Facts) -> DrafterState:
        return _CopyState(self)


class _CopyState(HostState):
    """at: for each row the place in its prompt that the next token is copied from, None while there is none. sure: the last
    token was a copied one. left: where the copying stopped, the last time that it did."""

    sources = ("copy",)

    def __init__(self, drafter: Copy) -> None:
        self.drafter = drafter
        self.prompts: list[list[int]] = []
        self.at: list[int | None] = []
        self.left: list[int | None] = []
        self.sure: list[bool] = []

    def begin(self, prefill: Prefill, context: Context) -> None:
        rows = len(context.texts)
        self.prompts = [text[:-1] for text in context.texts]
        self.at, self.left, self.sure = [None] * rows, [None] * rows, [False] * rows
        for row, text in enumerate(context.texts):
            self._follow(row, text, 1)

    def observe(self, outcome: Outcome, context: Context) -> None:
        for row, (text, length) in enumerate(zip(context.texts, outcome.lengths, strict=True)):
            self._follow(row, text, length)

    def _follow(self, row: int, text: list[int], length: int) -> None:
        """Move the place behind each of the last `length` tokens of `text`."""
        prompt = self.prompts[row]
        for end in range(len(text) - length + 1, len(text) + 1):
            at = self.at[row]
            self.sure[row] = at is not None and at < len(prompt) and prompt[at] == text[end - 1]
            if at is not None and self.sure[row]:
                self.at[row] = at + 1
                continue
            self.left[row] = at
            self.at[row] = next(self._found(row, text[:end]), None if at is None else at + 1)

    def _found(self, row: int, text: list[int]) -> Iterator[int]:
        """Places behind the suffix of `text` in the prompt: of the longest suffix first, near the old place first."""
        prompt, old = self.prompts[row], self.left[row] or 0
        for length in range(min(self.drafter.longest, len(text)), self.drafter.shortest - 1, -1):
            run = text[len(text) - length :]
            for place in (*range(old, min(old + self.drafter.window, len(prompt))), *range(len(prompt))):
                if place >= length and prompt[place - length : place] == run:
                    yield place

    def _places(self, row: int, text: list[int]) -> list[int]:
        """Where to copy from: the place; where it is a guess, also the next ones, and those behind one token replaced or put in."""
        at, left = self.at[row], self.left[row]
        found = dict.fromkeys([] if at is None else [at])
        if not self.sure[row] and self.drafter.width > 1:
            found |= dict.fromkeys([] if left is None else [left + 1, left])
            found |= dict.fromkeys(islice(self._found(row, text), self.drafter.width))
        return list(found)[: self.drafter.width]

    def grow(self, row: int, text: list[int], tree: HostTree) -> None:
        places = self._places(row, text)
        most, chance = (tree.left, SURE) if self.sure[row] else (TRIAL, UNSURE)
        for place in places:
            tree.line(self.prompts[row][place : place + most], chance)


SURE, UNSURE = 0.9, 0.5
"""Chance that a copied token is right: while the text is being copied, and where the place was guessed."""
TRIAL = 4
"""Tokens that are tried from a place that was guessed."""
