"""Aggressive Decoding: copy the input, and find the place again where the text left it (arXiv 2205.10350)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import ClassVar, Literal

from pydantic import Field

from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Prefill
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
    weighs: ClassVar[bool] = True
    nodes: int = Field(16, ge=1)
    longest: int = Field(4, ge=1)
    shortest: int = Field(1, ge=1)
    width: int = Field(2, ge=1)
    window: int = Field(32, ge=1)

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "chain" if self.width == 1 else "tree"

    def start(self, facts: Facts) -> DrafterState:
        return _CopyState(self).weighed(self, facts)


class _CopyState(HostState):
    sources = ("copy",)

    def __init__(self, drafter: Copy) -> None:
        self.drafter = drafter
        self.rows: list[Row | None] = []
        self.prompts: list[int] = []  # tokens of each

    def begin(self, prefill: Prefill, context: Context) -> None:
        self.prompts, self.rows = [len(text) - 1 for text in context.texts], [None for _ in context.texts]

    def grow(self, row: int, text: list[int], tree: HostTree) -> None:
        found = self.rows[row]
        if found is None:
            found = self.rows[row] = Row(self.drafter, text[: self.prompts[row]])
        found.follow(text)
        most, chance = (tree.left, SURE) if found.sure else (TRIAL, UNSURE)
        for place in found.places(text):
            tree.line(found.prompt[place : place + most], chance)


class Row:
    """Where in its prompt a row copies from. It is followed when drafts are asked for, and not before.

    at: the place that the next token is copied from, None while there is none. sure: the last token was a copied one. left: where
    the copying stopped, the last time that it did. known: tokens of the text that were followed.
    """

    def __init__(self, drafter: Copy, prompt: list[int]) -> None:
        self.drafter, self.prompt, self.known = drafter, prompt, len(prompt)
        self.at: int | None = None
        self.left: int | None = None
        self.sure = False
        self.behind: dict[int, list[int]] = {}  # each token's places, plus one
        for place, token in enumerate(prompt[:-1], 1):
            self.behind.setdefault(token, []).append(place)

    def follow(self, text: list[int]) -> None:
        """Move the place behind each new token of `text`."""
        for end in range(self.known + 1, len(text) + 1):
            at = self.at
            self.sure = at is not None and at < len(self.prompt) and self.prompt[at] == text[end - 1]
            if at is not None and self.sure:
                self.at = at + 1
                continue
            self.left = at
            self.at = next(self.found(text, end), None if at is None else at + 1)
        self.known = len(text)

    def found(self, text: list[int], end: int) -> Iterator[int]:
        """Places behind what precedes `end` in `text`, in the prompt: of the longest suffix first, near the old place first."""
        prompt, old = self.prompt, self.left or 0
        for length in range(min(self.drafter.longest, end), self.drafter.shortest - 1, -1):
            run = text[end - length : end]
            places = [place for place in self.behind.get(run[-1], ()) if place >= length and prompt[place - length : place] == run]
            yield from (place for place in places if old <= place < old + self.drafter.window)
            yield from places

    def places(self, text: list[int]) -> list[int]:
        """Where to copy from: the place; where it is a guess, also the next ones, and those behind one token replaced or put in."""
        found = dict.fromkeys([] if self.at is None else [self.at])
        if not self.sure and self.drafter.width > 1:
            found |= dict.fromkeys([] if self.left is None else [self.left + 1, self.left])
            found |= dict.fromkeys(islice(self.found(text, len(text)), self.drafter.width))
        return list(found)[: self.drafter.width]


SURE, UNSURE = 0.9, 0.5
"""Chance that a copied token is right: while the text is being copied, and where the place was guessed."""
TRIAL = 4
"""Tokens that are tried from a place that was guessed."""
