"""What followed every run of tokens in some texts: branches of a trie that is never built whole."""

from __future__ import annotations

PLACES = 32
"""Of a run that occurred more often, the last of these are counted."""


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
    """Every run of at most `depth` tokens of some texts, with how often it occurred; of at most `most` tokens, and when there are
    more, of the later half of them.

    Texts are put in by a `Reading` each. Only places are kept, by the token before each: a trie of the same runs has `depth` nodes
    for every token, nearly all of which nobody asks for.
    """

    def __init__(self, depth: int, most: int) -> None:
        self.depth, self.most, self.size = depth, most, 0
        self._places: dict[int, list[tuple[Reading, int]]] = {}
        self._readings: list[Reading] = []

    def after(self, run: list[int]) -> Node | None:
        """The branches behind `run` (of one token or more), if it occurred: their counts are those of its last `PLACES` times."""
        found, root = 0, Node()
        for reading, place in reversed(self._places.get(run[-1], ())):
            text = reading.text
            if text[max(0, place - len(run)) : place] != run:
                continue
            node = root
            for token in text[place : min(place + self.depth - len(run), reading.known)]:
                node = node.child(token)
                node.count += 1
            found += 1
            if found == PLACES:
                break
        return root if found else None

    def add(self, reading: Reading, begin: int) -> None:
        """Count what `reading` has from `begin` on."""
        if not self._readings or self._readings[-1] is not reading:
            self._readings = [each for each in self._readings if each is not reading] + [reading]
        for place in range(max(1, begin), reading.known):
            self._places.setdefault(reading.text[place - 1], []).append((reading, place))
        self.size += reading.known - begin
        if self.size > self.most:
            self._forget()

    def _forget(self) -> None:
        """Keep the later half: of the texts that were read last, and of each its end."""
        readings, left = self._readings, self.most // 2
        for reading in reversed(readings):
            reading.begin = max(reading.begin, reading.known - left)
            left -= reading.known - reading.begin
        self._places, self._readings, self.size = {}, [], 0
        for reading in readings:
            if reading.begin < reading.known:
                self.add(reading, reading.begin)


class Reading:
    """A text that grows, of which the first `known` tokens were given: runs that end there are not counted. begin: where counting
    begins."""

    def __init__(self, branches: Branches, known: int = 0) -> None:
        self.branches, self.known, self.begin = branches, known, known
        self.text: list[int] = []

    def read(self, text: list[int]) -> None:
        """Count every run that ends in what is new."""
        self.text, before, self.known = text, self.known, len(text)
        if before < len(text):
            self.branches.add(self, before)
