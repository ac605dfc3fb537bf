"""Lookahead: a trie of what was read and written, pruned to the most frequent branches (arXiv 2312.12728)."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill
from hasten.samplers.drafters.branches import Branches, Node, Reading
from hasten.samplers.drafters.host_tree import CALLS, HostState, HostTree

KEEP = "trie"
"""Name of what was written in `Facts.kept`."""

NOTHING = Node()
"""A run that did not occur."""


class Trie(Drafter):
    """Branches that followed the row's last tokens, in its prompt and in everything written so far (Lookahead of PIA, arXiv
    2312.12728; prefix hits and multi-branch drafts of its hierarchical strategy).

    branch: tokens of a stored branch. longest: tokens of a suffix that are looked for; shorter ones are asked while fewer than
    half the nodes are found. weight: of what was written, beside what this row was given (the paper's 1e-4: the prompt decides
    where it has anything). nodes: the most frequent ones are kept. keep: what was written is remembered by the next call of
    `generate`, until the session is closed. most: tokens that are remembered; above, the later half of them stays.

    Texts are read when drafts are asked for, and not before: rounds without drafts cost nothing. With `keep`, those of the last
    `CALLS` calls wait to be read; what is older, and nobody asked for drafts since, is forgotten.

    Differs: PIA builds its trie, of outputs when they are finished; here every token is known at once, and the branches behind a run
    are counted when they are asked for (`Branches`). It drops every node that is less frequent than the size-th, here ties are
    broken by which came first.
    """

    kind: ClassVar[str] = "trie"
    weighs: ClassVar[bool] = True
    nodes: int = Field(16, ge=1)
    branch: int = Field(12, ge=1)
    longest: int = Field(4, ge=1)
    weight: float = Field(1e-4, gt=0, lt=1)
    keep: bool = False
    most: int = Field(65_536, ge=1)

    def start(self, facts: Facts) -> DrafterState:
        depth = self.branch + self.longest
        written = facts.kept.setdefault(KEEP, Written(depth, self.most)) if self.keep else Written(depth, self.most)
        return _TrieState(self, written).weighed(self, facts)


@dataclass
class _Call:
    """What one call of `generate` wrote, and how far it is read."""

    texts: list[list[int]]
    readings: list[Reading]


class Written:
    """What was written, in the call of `generate` that goes on and in those before it."""

    def __init__(self, depth: int, most: int) -> None:
        self.branches = Branches(depth, most)
        self._calls = deque[_Call](maxlen=CALLS)

    def begin(self, texts: list[list[int]]) -> None:
        """A call's texts, of which the last token is written."""
        self._calls.append(_Call(texts, [Reading(self.branches, len(text) - 1) for text in texts]))

    def grew(self, texts: list[list[int]]) -> None:
        """They are these now."""
        self._calls[-1].texts = texts

    def read(self) -> None:
        """Count all of it."""
        for call in self._calls:
            for reading, text in zip(call.readings, call.texts, strict=True):
                reading.read(text)
        while len(self._calls) > 1:
            self._calls.popleft()


class _TrieState(HostState):
    sources = ("trie",)

    def __init__(self, drafter: Trie, written: Written) -> None:
        self.drafter, self.written = drafter, written
        self.given: list[Branches | None] = []
        self.prompts: list[int] = []  # tokens of each

    def begin(self, prefill: Prefill, context: Context) -> None:
        self.prompts, self.given = [len(text) - 1 for text in context.texts], [None for _ in context.texts]
        self.written.begin(context.texts)

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.written.grew(context.texts)

    def propose(self, context: Context, nodes: int) -> Proposal:
        self.written.read()
        return super().propose(context, nodes)

    def _given(self, row: int, text: list[int]) -> Branches:
        """Of the row's prompt, which is read when it is first asked for."""
        found = self.given[row]
        if found is None:
            found = self.given[row] = Branches(self.written.branches.depth, self.drafter.most)
            Reading(found).read(text[: self.prompts[row]])
        return found

    def grow(self, row: int, text: list[int], tree: HostTree) -> None:
        half, given, written = tree.left // 2, self._given(row, text), self.written.branches
        for length in range(min(self.drafter.longest, len(text)), 0, -1):
            run = text[len(text) - length :]
            self._branch(tree, given.after(run) or NOTHING, written.after(run) or NOTHING)
            if tree.left <= half:
                return

    def _branch(self, tree: HostTree, given: Node, written: Node) -> None:
        """Add the most frequent nodes below two nodes of the tries. Counts fall from parent to child, so the most frequent
        ones are a tree."""
        order, heap = 0, list[tuple[float, int, int, int, float, Node, Node]]()

        def open_(at: int, given: Node, written: Node, whole: float) -> None:
            nonlocal order
            for token in given.children.keys() | written.children.keys():
                pair = given.children.get(token, NOTHING), written.children.get(token, NOTHING)
                count = self._count(*pair)
                order += 1
                heapq.heappush(heap, (-count, order, at, token, count / whole if whole else 0.0, *pair))

        open_(0, given, written, sum(self._count(*pair) for pair in _pairs(given, written)))
        while heap and tree.left:
            count, _, at, token, chance, read, wrote = heapq.heappop(heap)
            node = tree.child(at, token, min(1.0, chance))
            if node is not None:
                open_(node, read, wrote, -count)

    def _count(self, given: Node, written: Node) -> float:
        weight = self.drafter.weight
        return (1 - weight) * given.count + weight * written.count


def _pairs(given: Node, written: Node) -> list[tuple[Node, Node]]:
    tokens = given.children.keys() | written.children.keys()
    return [(given.children.get(token, NOTHING), written.children.get(token, NOTHING)) for token in tokens]
