"""A trie of everything that occurred in some texts, and how far each of them has been read into it."""

from __future__ import annotations


class Node:
    """A run of tokens. count: how often it occurred; children: the runs that are one token longer."""

    __slots__ = ("children", "count")

    def __init__(self) -> None:
        self.count = 0.0
        self.children: dict[int, Node] = {}

    def child(self, token: int) -> Node:
        found = self.children.get(token)
        if found is None:
            found = self.children[token] = Node()
        return found


class Branches:
    """Every run of at most `depth` tokens of some texts, with how often it occurred; at most about `most` nodes.

    Texts are put in by a `Reading` each. squeezed: how often nodes were dropped, so that nobody holds on to them.
    """

    def __init__(self, depth: int, most: int) -> None:
        self.depth, self.most, self.root, self.size, self.squeezed = depth, most, Node(), 0, 0

    def after(self, run: list[int]) -> Node | None:
        """The node of `run`, if it occurred."""
        node: Node | None = self.root
        for token in run:
            node = node.children.get(token) if node is not None else None
        return node

    def squeeze(self) -> None:
        """Halve the counts, and drop what is below one."""
        self.size, open_ = 0, [self.root]
        self.squeezed += 1
        while open_:
            node = open_.pop()
            for child in node.children.values():
                child.count /= 2
            node.children = {token: child for token, child in node.children.items() if child.count >= 1}
            self.size += len(node.children)
            open_ += node.children.values()


class Reading:
    """A text that grows, of which the first `known` tokens are counted in `branches`, or given: runs that end there are not.

    A new token ends a run of each length, whose nodes are the children of those that the token before it ended. They are kept, so
    that it costs `depth` steps.
    """

    def __init__(self, branches: Branches, known: int = 0) -> None:
        self.branches, self.known = branches, known
        self._ended: list[Node] = []
        self._age = -1

    def read(self, text: list[int]) -> None:
        """Count every run that ends in what is new."""
        branches, begin = self.branches, self.known
        if begin == len(text):
            return
        if self._age != branches.squeezed:  # some of the nodes may have been dropped
            self._age, self._ended = branches.squeezed, self._walked(text)
        for token in text[begin:]:
            self._count(token)
        self.known = len(text)
        if branches.size > branches.most:
            branches.squeeze()

    def _walked(self, text: list[int]) -> list[Node]:
        """Nodes of the runs that end with the last known token, the shortest first."""
        found = []
        for start in range(self.known - 1, max(0, self.known - self.branches.depth + 1) - 1, -1):
            node = self.branches.root
            for token in text[start : self.known]:
                node = node.child(token)
            found.append(node)
        return found

    def _count(self, token: int) -> None:
        ended, fresh = [], 0
        for node in (self.branches.root, *self._ended[: self.branches.depth - 1]):
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = Node()
            fresh += child.count == 0
            child.count += 1
            ended.append(child)
        self._ended = ended
        self.branches.size += fresh
