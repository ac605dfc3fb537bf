"""What followed the runs of tokens in a text: counts that a guess at the next token is blended from."""

from __future__ import annotations

import heapq

ALONE, WEIGHT, MOST = 0.97, 0.5, 32
"""Of runs of no tokens at all, which say what the text is made of: the factor on its counts at each token, the run's weight in
place of its length, and how many tokens are kept."""
ENOUGH = 0.12
"""Where less than this share is left for shorter runs, they are not asked."""


class Contexts:
    """Counts of the tokens behind every run of `shortest` to `longest` tokens.

    fade: factor on the counts of a run whenever it is seen again: 1 counts all alike (the most frequent), 0 only the last
    time. Holds about 200 bytes for each token and length.
    """

    def __init__(self, shortest: int, longest: int, fade: float = 1.0) -> None:
        self.lengths, self.fade = range(longest, shortest - 1, -1), fade
        self.seen: dict[tuple[int, ...], dict[int, float]] = {}
        self.known = 0

    def read(self, text: list[int]) -> None:
        """Take in what is new of a text that grew."""
        for place in range(self.known, len(text)):
            token = text[place]
            for length in self.lengths:
                if length <= place:
                    self._count(tuple(text[place - length : place]), token)
        self.known = len(text)

    def _count(self, run: tuple[int, ...], token: int) -> None:
        seen = self.seen.get(run)
        if seen is None:
            self.seen[run] = {token: 1.0}
            return
        fade = self.fade if run else ALONE
        if fade == 0:
            seen.clear()
        elif fade != 1:
            for each in seen:
                seen[each] *= fade
        seen[token] = seen.get(token, 0.0) + 1
        if not run and len(seen) > MOST:
            del seen[min(seen, key=seen.__getitem__)]

    def after(self, tail: list[int], most: int) -> list[tuple[int, float]]:
        """At most `most` guesses at the token behind `tail`, the best first, with the chance of each.

        The longest run that was seen gives n c / (n sum(c) + kinds) to a token that followed it c times, and what is left
        to shorter runs in the same way: prediction by partial matching, with a run's length n as its weight.
        """
        left, found, seen_of = 1.0, dict[int, float](), self.seen.get
        for length in self.lengths:
            seen = seen_of(tuple(tail[len(tail) - length :])) if length <= len(tail) else None
            if seen is None:
                continue
            weight = length or WEIGHT
            if not found and len(seen) == 1:  # the usual case in a copy: one token, seen often enough
                token, count = next(iter(seen.items()))
                found[token], left = weight * count / (weight * count + 1), 1 / (weight * count + 1)
            else:
                whole = weight * sum(seen.values()) + len(seen)
                for token, count in seen.items():
                    found[token] = found.get(token, 0.0) + left * weight * count / whole
                left *= len(seen) / whole
            if left < ENOUGH:
                break
        if len(found) == 1:
            return list(found.items())
        return heapq.nlargest(most, found.items(), key=lambda pair: pair[1])
