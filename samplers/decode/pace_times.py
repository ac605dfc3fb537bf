"""What rounds take, by their drafts."""

from __future__ import annotations

from collections import deque
from statistics import median

RUN = 16
"""Rounds without drafts that are run in one go, at most."""


class Times:
    """Seconds by size: the median of the last of each, else on the line between or beyond the sizes that are known.

    What is known of one size alone is taken for all smaller ones, and for larger ones in proportion. known: the medians.
    """

    def __init__(self) -> None:
        self.last: dict[int, deque[float]] = {}
        self.known: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> None:
        times = self.last.setdefault(size, deque(maxlen=9))
        times.append(seconds)
        self.known[size] = median(times)

    def of(self, size: int) -> float:
        """0 where nothing is known."""
        known = self.known
        if size in known or not known:
            return known.get(size, 0.0)
        if len(known) == 1:
            (only, seconds), = known.items()
            return seconds * max(1.0, size / only) if only else seconds
        below = max((each for each in known if each < size), default=None)
        above = min((each for each in known if each > size), default=None)
        low, high = (min(known), max(known)) if below is None or above is None else (below, above)
        return known[low] + max(0.0, known[high] - known[low]) / (high - low) * (size - low)


def sizes(most: int) -> list[int]:
    """Numbers of drafts worth comparing: none, the powers of two, and `most`."""
    return [0, *(1 << power for power in range(most.bit_length()) if 1 << power < most), most]
