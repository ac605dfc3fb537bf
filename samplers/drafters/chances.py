"""How often guesses of a stated chance turn out right."""

from __future__ import annotations

from bisect import bisect_right

EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Bounds of the bins in which chances are counted; narrower where copies are nearly certain."""


class Chances:
    """Stated chances, corrected by what became of them: in each bin the share of guesses that were right, a moving average which
    the stated chance itself begins with the weight of `trust` guesses. memory: guesses that it reaches back, about.

    A drafter that counts what followed before is right about greedy texts and far too sure about sampled ones; what is drafted
    next and how much of it is worth reading depend on that.
    """

    def __init__(self, trust: float = 6.0, memory: float = 200.0) -> None:
        self.trust, self.fade = trust, 1 - 1 / memory
        self.seen, self.right = [0.0] * (len(EDGES) + 1), [0.0] * (len(EDGES) + 1)

    def of(self, stated: float) -> float:
        """The chance that a guess of this stated chance is right."""
        place = bisect_right(EDGES, stated)
        return (self.trust * stated + self.right[place]) / (self.trust + self.seen[place])

    def learn(self, stated: float, right: bool) -> None:
        """A guess of this stated chance was right, or was not."""
        place = bisect_right(EDGES, stated)
        self.seen[place] = self.fade * self.seen[place] + 1
        self.right[place] = self.fade * self.right[place] + right
