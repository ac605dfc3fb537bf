"""How the noise levels of a run are chosen: lists of numbers, of no model in particular.

Names: n how many levels; u a share of the training time, 1 all noise; sigma a level of noise of whatever unit the caller has.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

from hasten.errors import UsageError

Spacing = Literal["trailing", "linspace", "karras", "exponential", "beta"]

SHARES = ("trailing", "linspace")
"""Spacings of time; the others are of noise."""


def shares(spacing: Spacing, n: int, smallest: float) -> list[float]:
    """n even shares u that fall from 1: trailing to 1 / n, linspace to `smallest`, the least noise that was trained on.

    Names as in "Common Diffusion Noise Schedules" (arXiv 2305.08891, table 2). Raises `UsageError` for a spacing of noise.
    """
    if spacing == "trailing":
        return [1 - i / n for i in range(n)]
    if spacing == "linspace":
        return [1 + (smallest - 1) * i / max(1, n - 1) for i in range(n)]
    raise UsageError(f"{spacing!r} spaces noise levels, not times; allowed here: {', '.join(SHARES)}.")


def between(spacing: Spacing, n: int, top: float, bottom: float) -> list[float]:
    """n levels sigma that fall from `top` to `bottom` > 0.

    karras: even in sigma^(1/7) (EDM, arXiv 2206.00364, eq. 5). exponential: even in log sigma. beta: quantiles of
    Beta(0.6, 0.6), dense at both ends (arXiv 2407.12173). Raises `UsageError` for a spacing of time.
    """
    if spacing in SHARES or spacing not in get_args(Spacing):
        allowed = [name for name in get_args(Spacing) if name not in SHARES]
        raise UsageError(f"{spacing!r} does not space noise levels; allowed here: {', '.join(allowed)}.")
    places = [i / max(1, n - 1) for i in range(n)]
    if spacing == "karras":
        high, low = top ** (1 / 7), bottom ** (1 / 7)
        return [(high + place * (low - high)) ** 7 for place in places]
    if spacing == "exponential":
        return [top * (bottom / top) ** place for place in places]
    return [bottom + (top - bottom) * quantile for quantile in _beta_quantiles([1 - place for place in places])]


def shifted(u: float, shift: float) -> float:
    """The flow's sigma of a share u (SD3, arXiv 2403.03206, eq. 23): more of the run at high noise for shift > 1."""
    return shift * u / (1 + (shift - 1) * u)


def _beta_quantiles(places: Sequence[float], a: float = 0.6, cells: int = 4096) -> list[float]:
    """Quantiles of Beta(a, a). With x = sin(angle)^2 its density is (sin cos)^(2 a - 1), which is finite everywhere."""
    angles = [math.pi / 2 * i / cells for i in range(cells + 1)]
    density = [(math.sin(x) * max(0.0, math.cos(x))) ** (2 * a - 1) for x in angles]
    sums = [0.0]
    for left, right in pairwise(density):
        sums.append(sums[-1] + left + right)
    return [math.sin(_inverse(sums, angles, place * sums[-1])) ** 2 for place in places]


def _inverse(rising: Sequence[float], values: Sequence[float], at: float) -> float:
    """Where the straight lines through (values, rising) reach `at`."""
    high = min(max(1, bisect_left(rising, at)), len(rising) - 1)
    width = rising[high] - rising[high - 1]
    return values[high - 1] + (at - rising[high - 1]) / width * (values[high] - values[high - 1])
