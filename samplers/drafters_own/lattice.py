"""Paths through a lattice: guesses at each of several places, made at once and so without knowing of each other, are put together by
a causal proxy that knows what follows what.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

Guesses = Sequence[tuple[int, float]]
"""Tokens of one place with their chances, the best first."""

Follows = Callable[[list[int]], dict[int, float]]
"""Tokens behind a text -> chance of each token that it has ever seen there."""

FLOOR = 1e-3
"""Chance that the proxy gives what it has not seen."""


def best_paths(lattice: Sequence[Guesses], tail: list[int], follows: Follows, beam: int, weight: float) -> list[tuple[list[int], float]]:
    """The `beam` paths of greatest sum of log chances, the best first: those of the lattice, and `weight` times those of the proxy
    behind the path so far (causal-consistency path search: DiffuSpec, arXiv 2510.02358). tail: the text's last tokens."""
    front: list[tuple[float, list[int]]] = [(0.0, [])]
    for guesses in lattice:
        wider = []
        for score, path in front:
            seen = follows(tail + path)
            for token, chance in guesses:
                proxy = math.log(max(seen.get(token, 0.0), FLOOR))
                wider.append((score + math.log(max(chance, 1e-9)) + weight * proxy, [*path, token]))
        front = heapq.nlargest(beam, wider, key=lambda each: each[0])
    return [(path, score) for score, path in front]
