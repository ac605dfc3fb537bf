"""Trees of drafts that are made on the host, row by row: what drafters without a network of their own grow."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor

from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts
from hasten.samplers.drafters.chances import Chances

Guesses = Iterable[tuple[int, float]]
"""Tokens with the chance of each, the best first."""

CALLS = 8
"""Calls of `generate` that wait unread in a drafter that remembers, while it is asked for nothing."""


class HostTree:
    """The drafts of one row while they grow. Node 0 is the row's last token; a parent stands before its children.

    nodes: drafts that it may have at most; depth: how deep they may be. tokens, parent, depths, score, source: of each node;
    score is the estimated chance that the node stands.
    """

    def __init__(self, nodes: int, depth: int, chances: Chances | None = None) -> None:
        self.left, self.depth, self.chances = nodes if depth > 0 else 0, depth, chances
        self.stated = [1.0]
        self.tokens, self.parent, self.depths, self.score, self.source = [0], [-1], [0], [1.0], [0]
        self._children: dict[tuple[int, int], int] = {}

    def child(self, at: int, token: int, chance: float, source: int = 0) -> int | None:
        """The node of `token` behind node `at`, made where there is none; None where the tree may not grow there. chance:
        that the token is right if all before it are."""
        found = self._children.get((at, token))
        if found is not None:
            return found
        if self.left <= 0 or self.depths[at] >= self.depth:
            return None
        node = len(self.tokens)
        self._children[at, token] = node
        self.stated.append(chance)
        chance = self.chance(chance)
        for each, value in (
            (self.tokens, token), (self.parent, at), (self.depths, self.depths[at] + 1),
            (self.score, self.score[at] * chance), (self.source, source),
        ):  # fmt: skip
            each.append(value)  # type: ignore[arg-type]
        self.left -= 1
        return node

    def chance(self, stated: float) -> float:
        """What a guess of this stated chance is worth."""
        return stated if self.chances is None else self.chances.of(stated)

    def learn(self, tokens: list[int]) -> None:
        """What was written from behind node 0 on: of each node whose parent was written, was it right?"""
        if self.chances is None:
            return
        children: dict[int, list[int]] = {}
        for node in range(1, len(self.tokens)):
            children.setdefault(self.parent[node], []).append(node)
        at = 0
        for token in tokens:
            below, at = children.get(at, ()), -1
            for node in below:
                right = self.tokens[node] == token
                self.chances.learn(self.stated[node], right)
                at = node if right else at
            if at < 0:
                return

    def best(self, nodes: int) -> HostTree:
        """Its `nodes` drafts that most probably stand."""
        if len(self.tokens) - 1 <= nodes:
            return self
        kept = sorted(sorted(range(1, len(self.tokens)), key=lambda node: -self.score[node])[:nodes])
        found = HostTree(nodes, self.depth)
        names = {0: 0}
        for node in kept:
            names[node] = len(found.tokens)
            for name in ("tokens", "depths", "score", "source"):
                getattr(found, name).append(getattr(self, name)[node])
            found.parent.append(names[self.parent[node]])
        return found

    def line(self, tokens: Iterable[int], chance: float, source: int = 0) -> int:
        """Add tokens one behind the other from node 0 on, joined with what is there; returns how many nodes are new."""
        at, before = 0, self.left
        for token in tokens:
            node = self.child(at, token, chance, source)
            if node is None:
                break
            at = node
        return before - self.left


def best_first(tree: HostTree, guesses: Callable[[list[int]], Guesses]) -> None:
    """Grow `tree` by the node that most probably stands, until it is full or nobody guesses any more.

    guesses: what may follow, given the tokens from behind node 0.
    """
    paths: dict[int, list[int]] = {0: []}
    heap: list[tuple[float, int, int, int, float]] = []
    order = 0

    def open_(node: int) -> None:
        nonlocal order
        if tree.depths[node] < tree.depth:
            for token, chance in guesses(paths[node]):
                order += 1
                heapq.heappush(heap, (-tree.score[node] * tree.chance(chance), order, node, token, chance))

    open_(0)
    while heap and tree.left:
        _, _, parent, token, chance = heapq.heappop(heap)
        node = tree.child(parent, token, chance)
        if node is not None and node not in paths:
            paths[node] = [*paths[parent], token]
            open_(node)


class HostState(DrafterState):
    """A drafter's state that grows one `HostTree` for each row. sources: names of the trees' `source`. chances: corrects what it
    says of its guesses; None: it says nothing that could be weighed. grown: the last trees, and the texts' lengths before them."""

    sources: tuple[str, ...] = ("draft",)

    chances: Chances | None = None
    grown: tuple[list[HostTree], list[int]] = ([], [])

    def weighed(self, drafter: Drafter, facts: Facts) -> Self:
        """This, for a drafter that says how sure it is: its chances are corrected by what becomes of them, from call to call, and the
        pace may read the best of its drafts alone."""
        self.chances = facts.kept.setdefault(f"chances:{drafter.kind}:{facts.sampled}", Chances())
        return self

    def propose(self, context: Context, nodes: int) -> Proposal:
        for tree, begin, text in zip(*self.grown, context.texts, strict=False):
            tree.learn(text[begin : begin + tree.depth])
        trees = []
        for row, text in enumerate(context.texts):
            tree = HostTree(nodes, min(nodes, context.room[row] - 1) if context.active[row] else 0, self.chances)
            if tree.left:
                self.grow(row, text, tree)
            trees.append(tree)
        self.grown = trees, [len(text) for text in context.texts]
        if self.chances is not None and context.weigh is not None:
            worth = context.weigh([sorted(tree.score[1:], reverse=True) for tree in trees], context)
            trees = [tree.best(worth) for tree in trees]
        return joined(trees, context.last, self.sources)

    def grow(self, row: int, text: list[int], tree: HostTree) -> None:
        """Add drafts behind `text`, which is not to be changed, to an empty tree."""
        raise NotImplementedError(f"{type(self).__name__} has no grow().")


def joined(trees: list[HostTree], last: Tensor, sources: tuple[str, ...]) -> Proposal:
    """One proposal of the rows' trees, as points. last int64 [B]."""
    size = max(len(tree.tokens) for tree in trees)
    if size == 1:
        return nothing(last)
    data = [
        [each + [0] * (size - len(each)) for each in lists]
        for lists in (
            [tree.tokens for tree in trees], [tree.parent for tree in trees], [[1] * len(tree.tokens) for tree in trees],
            [tree.source for tree in trees],
        )
    ]  # fmt: skip
    tokens, parent, valid, source = torch.tensor(data, device=last.device)
    score = torch.tensor([tree.score + [0.0] * (size - len(tree.score)) for tree in trees], device=last.device)
    tokens = torch.cat([last[:, None], tokens[:, 1:]], 1)
    return Proposal(tokens, parent, valid.bool(), score, source, sources)
