"""Lookahead: a trie of what was read and written, pruned to the most frequent branches (arXiv 2312.12728)."""

from __future__ import annotations

import heapq
from typing import ClassVar

from pydantic import Field

from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill
from hasten.samplers.drafters.host_tree import HostState, HostTree

KEEP = "trie"
"""Name of the trie of outputs in `Facts.kept`."""


class Trie(Drafter):
    """Branches that followed the row's last tokens, in its prompt and in everything written so far (Lookahead of PIA, arXiv
    2312.12728; prefix hits and multi-branch drafts of its hierarchical strategy).

    branch: tokens of a stored branch. longest: tokens of a suffix that are looked for; shorter ones are asked while fewer than
    half the nodes are found. weight: of what was written, beside what this row was given (the paper's 1e-4: the prompt decides
    where it has anything). nodes: the most frequent ones are kept. keep: what was written is remembered by the next call of
    `generate`, until the session is closed. most: nodes of the remembered trie; above, all counts are halved and the single
    ones dropped.

    Differs: PIA stores outputs when they are finished, here every token is known at once; it drops every node that is less
    frequent than the size-th, here ties are broken by which came first.
    """

    kind: ClassVar[str] = "trie"
    nodes: int = Field(16, ge=1)
    branch: int = Field(12, ge=1)
    longest: int = Field(4, ge=1)
    weight: float = Field(1e-4, gt=0, lt=1)
    keep: bool = False
    most: int = Field(65_536, ge=1)

    def start(self, facts: Facts) -> DrafterState:
        depth = self.branch + self.longest
        written = facts.kept.setdefault(KEEP, Branches(depth, self.most)) if self.keep else Branches(depth, self.most)
        return _TrieState(self, facts.rows, written)


class _Node:
    __slots__ = ("children", "count")

    def __init__(self) -> None:
        self.count, self.children = 0.0, dict[int, _Node]()

    def child(self, token: int) -> _Node:
        found = self.children.get(token)
        if found is None:
            found = self.children[token] = _Node()
        return found


class Branches:
    """Every run of at most `depth` tokens of some texts, with how often it occurred; at most about `most` nodes."""

    def __init__(self, depth: int, most: int) -> None:
        self.depth, self.most, self.root, self.size = depth, most, _Node(), 0

    def put(self, tokens: list[int], begin: int) -> None:
        """Count every run that ends at or behind place `begin` of a text that grew."""
        for start in range(max(0, begin - self.depth + 1), len(tokens)):
            node = self.root
            for place in range(start, min(start + self.depth, len(tokens))):
                node = node.child(tokens[place])
                if place >= begin:
                    self.size += node.count == 0
                    node.count += 1
        if self.size > self.most:
            self._squeeze()

    def after(self, run: list[int]) -> _Node | None:
        """The node of `run`, if it occurred."""
        node: _Node | None = self.root
        for token in run:
            node = node.children.get(token) if node is not None else None
        return node

    def _squeeze(self) -> None:
        """Halve the counts, and drop what is below one."""
        self.size, open_ = 0, [self.root]
        while open_:
            node = open_.pop()
            for child in node.children.values():
                child.count /= 2
            node.children = {token: child for token, child in node.children.items() if child.count >= 1}
            self.size += len(node.children)
            open_ += node.children.values()


class _TrieState(HostState):
    sources = ("trie",)

    def __init__(self, drafter: Trie, rows: int, written: Branches) -> None:
        self.drafter, self.written = drafter, written
        self.given = [Branches(written.depth, drafter.most) for _ in range(rows)]
        self.known = [0] * rows

    def begin(self, prefill: Prefill, context: Context) -> None:
        for row, text in enumerate(context.texts):
            self.given[row].put(text[:-1], 0)
            self.known[row] = len(text) - 1
        self._learn(context.texts)

    def observe(self, outcome: Outcome, context: Context) -> None:
        self._learn(context.texts)

    def _learn(self, texts: list[list[int]]) -> None:
        for row, text in enumerate(texts):
            begin = max(0, self.known[row] - self.written.depth + 1)
            self.written.put(text[begin:], self.known[row] - begin)
            self.known[row] = len(text)

    def grow(self, row: int, text: list[int], tree: HostTree) -> None:
        half = tree.left // 2
        for length in range(min(self.drafter.longest, len(text)), 0, -1):
            run = text[len(text) - length :]
            found = [self.given[row].after(run), self.written.after(run)]
            self._branch(tree, found[0] or _Node(), found[1] or _Node())
            if tree.left <= half:
                return

    def _branch(self, tree: HostTree, given: _Node, written: _Node) -> None:
        """Add the most frequent nodes below two nodes of the tries. Counts fall from parent to child, so the most frequent
        ones are a tree."""
        order, heap = 0, list[tuple[float, int, int, int, float, _Node, _Node]]()

        def open_(at: int, given: _Node, written: _Node, whole: float) -> None:
            nonlocal order
            for token in given.children.keys() | written.children.keys():
                pair = given.children.get(token, _NOTHING), written.children.get(token, _NOTHING)
                count = self._count(*pair)
                order += 1
                heapq.heappush(heap, (-count, order, at, token, count / whole if whole else 0.0, *pair))

        open_(0, given, written, sum(self._count(*pair) for pair in _pairs(given, written)))
        while heap and tree.left:
            count, _, at, token, chance, read, wrote = heapq.heappop(heap)
            node = tree.child(at, token, min(1.0, chance))
            if node is not None:
                open_(node, read, wrote, -count)

    def _count(self, given: _Node, written: _Node) -> float:
        weight = self.drafter.weight
        return (1 - weight) * given.count + weight * written.count


_NOTHING = _Node()


def _pairs(given: _Node, written: _Node) -> list[tuple[_Node, _Node]]:
    tokens = given.children.keys() | written.children.keys()
    return [(given.children.get(token, _NOTHING), written.children.get(token, _NOTHING)) for token in tokens]
