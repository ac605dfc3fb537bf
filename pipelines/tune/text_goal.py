"""What may be lost of texts: the share of prompts whose answer has to stay, and what a number of prompts can show of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from hasten.budget import Budget
from hasten.errors import UsageError

LEVEL = 0.95
"""Of intervals: they hold the true share so often."""

_WRITTEN = re.compile(r"\s*(?:(exact_match)\s*(>=|=|<=|<|>)\s*)?(\d+(?:\.\d*)?|\.\d+)\s*(%)?\s*")


@dataclass(frozen=True, slots=True)
class TextGoal:
    """A recipe is good enough when at least the share `limit` of its texts are those of sequential decoding, token by token."""

    limit: float

    def met(self, share: float) -> bool:
        """Whether this share of equal texts is enough."""
        return share >= self.limit - 1e-12

    @property
    def needed(self) -> int | None:
        """So many prompts without one lost answer show that the share holds; None where no number of them can."""
        return math.ceil(math.log((1 - LEVEL) / 2) / math.log(self.limit)) if self.limit < 1 else None

    def __str__(self) -> str:
        return f"exact_match >= {100 * self.limit:g} %"

    @classmethod
    def read(cls, given: str | Budget) -> TextGoal:
        """From `"exact_match>=0.99"`, `"exact_match>=99%"`, `"99%"` or `Budget(exact_match=0.99)`. Raises `UsageError` for anything else."""
        if isinstance(given, Budget):
            if given.exact_match is None:
                about = "causal language models" if given.lossless else "pictures"
                raise UsageError(f"This Budget is about {about}, and this model writes texts in any order. Pass Budget(exact_match=0.99).")
            return cls(given.exact_match)
        found = _WRITTEN.fullmatch(given)
        if found is None:
            raise UsageError(f"The budget {given!r} is none for texts. Write exact_match>=0.99, or 99%.")
        limit = float(found[3]) / (100 if found[4] else 1)
        if found[2] in ("<=", "<", ">"):
            raise UsageError(f"The budget {given!r} is none for texts. Write exact_match>={limit:g}.")
        if not 0 < limit <= 1:
            raise UsageError(f"A share of texts lies above 0 and is 1 at most, got {limit:g}. Write exact_match>=0.99, or 99%.")
        return cls(limit)


def interval(same: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """Where the true share may lie after `same` of `total` were: the exact interval of Clopper and Pearson (Biometrika 26, 1934).

    level: how often such an interval holds the truth. Raises `ValueError` for numbers that do not fit.
    """
    if not 0 <= same <= total or total < 1 or not 0 < level < 1:
        raise ValueError(f"an interval of level {level} for {same} of {total} does not exist")
    tail = (1 - level) / 2
    low = 0.0 if same == 0 else _root(lambda share: 1 - at_most(same - 1, total, share) - tail)
    high = 1.0 if same == total else _root(lambda share: tail - at_most(same, total, share))
    return low, high


def at_most(count: int, total: int, share: float) -> float:
    """The probability of at most `count` successes in `total` draws, each with probability `share`."""
    if share <= 0 or count >= total:
        return 1.0
    if share >= 1 or count < 0:
        return 0.0
    ways = math.lgamma(total + 1)
    terms = (
        ways - math.lgamma(k + 1) - math.lgamma(total - k + 1) + k * math.log(share) + (total - k) * math.log1p(-share)
        for k in range(count + 1)
    )
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def _root(rising: Callable[[float], float]) -> float:
    """Where a function that rises in (0, 1) is 0, to within 1e-9."""
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
