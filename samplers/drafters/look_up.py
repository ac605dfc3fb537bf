"""Prompt look-up: what followed the last few tokens when they stood in the text before."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from hasten.errors import RecipeError
from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts


class LookUp(Drafter):
    """Copy what stood behind the last occurrence of the row's longest suffix that occurs before (prompt look-up decoding;
    input-guided copying of Aggressive Decoding, arXiv 2205.10350).

    longest, shortest: tokens of a suffix that are looked for. width: so many different continuations, joined to a tree: of the
    longest suffix the latest occurrence first, then earlier ones, then those of shorter suffixes. A continuation that
    reaches the end of the text goes on with itself, so that a loop is drafted as a loop. nodes: of the tree.

    Differs from transformers' prompt look-up, which takes the earliest occurrence of at most 2 tokens, for one row, as a
    chain that ends with the text.
    """

    kind: ClassVar[str] = "look-up"
    nodes: int = Field(10, ge=1)
    longest: int = Field(8, ge=1)
    shortest: int = Field(1, ge=1)
    width: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> LookUp:
        if self.shortest > self.longest:
            raise RecipeError(f"look-up: shortest={self.shortest} is longer than longest={self.longest}. Exchange them.")
        return self

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "chain" if self.width == 1 else "tree"

    def start(self, facts: Facts) -> DrafterState:
        return _LookUpState(self, facts.rows)


class _LookUpState(DrafterState):
    def __init__(self, drafter: LookUp, rows: int) -> None:
        self.drafter = drafter
        self.indices = [_Index(drafter.shortest, drafter.longest) for _ in range(rows)]

    def propose(self, context: Context, nodes: int) -> Proposal:
        trees = []
        for row, text in enumerate(context.texts):
            self.indices[row].read(text)
            found = _Trie(nodes, min(nodes, context.room[row] - 1)) if context.active[row] else _Trie(0, 0)
            self._grow(found, self.indices[row], text)
            trees.append(found)
        return joined(trees, context.last, "look-up")

    def _grow(self, trie: _Trie, index: _Index, text: list[int]) -> None:
        """Add continuations until there are `width` of them: the first gets most of the nodes, and what the others leave."""
        places = index.places(text, 4 * self.drafter.width) if trie.left else []
        for number, (start, matched) in enumerate(places):
            share = FIRST if number == 0 and self.drafter.width > 1 else 1.0
            trie.add(_copy(text, start, max(1, round(share * trie.left))), matched / (matched + 1))
            if not trie.left or trie.branches == self.drafter.width:
                break
        if places and trie.left:
            trie.add(_copy(text, places[0][0], len(trie.tokens) + trie.left), places[0][1] / (places[0][1] + 1))


FIRST = 0.7
"""Share of a tree's nodes for the best continuation."""


class _Index:
    """Where every run of `shortest` to `longest` tokens of a text ends, latest last."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.lengths = range(longest, shortest - 1, -1)
        self.ends: dict[tuple[int, ...], list[int]] = {}
        self.known = 0

    def read(self, text: list[int]) -> None:
        """Take in what is new of `text`. The run that ends with the text is left for the next time: it would find itself."""
        for end in range(self.known, len(text) - 1):
            for length in self.lengths:
                if length <= end + 1:
                    self.ends.setdefault(tuple(text[end + 1 - length : end + 1]), []).append(end + 1)
        self.known = max(self.known, len(text) - 1)

    def places(self, text: list[int], most: int) -> list[tuple[int, int]]:
        """Where the text's suffix occurred before: at most `most` pairs of where its continuation starts, and how long the
        suffix was; the longest first, of one length the latest first."""
        found: dict[int, int] = {}
        for length in self.lengths:
            if length < len(text):
                for start in reversed(self.ends.get(tuple(text[len(text) - length :]), [])[-most:]):
                    found.setdefault(start, length)
            if len(found) >= most:
                break
        return list(found.items())[:most]


class _Trie:
    """Continuations of one row, joined at their common beginnings. Nodes in the order in which they were added, parents
    first; node 0 is the row's last token."""

    def __init__(self, nodes: int, depth: int) -> None:
        self.left, self.depth, self.branches = nodes, depth, 0
        self.tokens, self.parent, self.score = [0], [-1], [1.0]
        self.children: dict[tuple[int, int], int] = {}

    def add(self, tokens: list[int], chance: float) -> None:
        """chance: that a token is right if those before it are."""
        at, new = 0, False
        for token in tokens[: self.depth]:
            child = self.children.get((at, token))
            if child is None:
                if self.left <= 0:
                    break
                child, new = len(self.tokens), True
                self.children[at, token] = child
                self.tokens.append(token)
                self.parent.append(at)
                self.score.append(self.score[at] * chance)
                self.left -= 1
            at = child
        self.branches += new


def joined(tries: list[_Trie], last: torch.Tensor, source: str) -> Proposal:
    """One proposal of the rows' trees. last int64 [B]."""
    size = max(len(trie.tokens) for trie in tries)
    if size == 1:
        return nothing(last)
    data = [
        [each + [fill] * (size - len(each)) for each in lists]
        for lists, fill in (
            ([trie.tokens for trie in tries], 0), ([trie.parent for trie in tries], 0),
            ([[1] * len(trie.tokens) for trie in tries], 0),
        )
    ]  # fmt: skip
    tokens, parent, valid = torch.tensor(data, device=last.device)
    score = torch.tensor([trie.score + [0.0] * (size - len(trie.score)) for trie in tries], device=last.device)
    return Proposal(torch.cat([last[:, None], tokens[:, 1:]], 1), parent, valid.bool(), score, sources=(source,))


def _copy(text: list[int], start: int, length: int) -> list[int]:
    """`length` tokens from `start`; where the text ends, what was copied goes on."""
    found: list[int] = []
    for step in range(length):
        place = start + step
        found.append(text[place] if place < len(text) else found[place - len(text)])
    return found
