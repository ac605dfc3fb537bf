"""The numbers of a run of few steps that can be fitted: where it evaluates, what its outputs weigh, how much held guidance counts.

Shapes: P numbers; way [P] by how much each is moved, levels in log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from hasten.recipe import Guidance, Recipe
from hasten.samplers.guidance import ListedGuidance
from hasten.samplers.solver import Solver

MEMORY = 3
"""Outputs that are mixed."""

APART = 1.03
"""A level is at least so many times the next one."""

STRIDE = 0.5
"""How far a level may move in one round, in log."""


@dataclass(frozen=True)
class Few:
    """A solver with levels and weights, and the guidance beside it.

    Its numbers, in order: every level but the first; every weight; of listed guidance, a factor for each step without a second
    branch.
    """

    solver: Solver
    guidance: Guidance | None = None

    @property
    def recipe(self) -> Recipe:
        """Both as a recipe, without a name."""
        return Recipe(sampler=self.solver, guidance=self.guidance)

    @property
    def told(self) -> Few:
        """The same with a factor for every step, 1 where none was given."""
        if not isinstance(self.guidance, ListedGuidance) or self.guidance.factors:
            return self
        return Few(self.solver, self.guidance.model_copy(update={"factors": (1.0,) * len(self._times)}))

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return len(self._times) - 1 + sum(len(row) for row in self.solver.weights or ()) + len(self._held)

    @property
    def apart(self) -> bool:
        """Are its levels so far apart that each can be moved by a little?"""
        return all(a > APART * b for a, b in pairwise(self._times))

    @property
    def rounded(self) -> Few:
        """Six digits: a recipe is read by people."""
        return self._with(*[[round(number, 6) for number in part] for part in self._parts()])

    def within(self, way: Tensor) -> Tensor:
        """`way` [P] with no level moved too far at once."""
        way = way.clone()
        way[: len(self._times) - 1] = way[: len(self._times) - 1].clamp(-STRIDE, STRIDE)
        return way

    def moved(self, way: Sequence[float]) -> Few | None:
        """Every number moved, levels in log and by at most `STRIDE`. None where levels would not fall any more."""
        times, weights, factors = self._parts()
        numbers = iter(way)
        for k in range(1, len(times)):
            times[k] *= math.exp(max(-STRIDE, min(STRIDE, next(numbers))))
        weights = [weight + next(numbers) for weight in weights]
        for k in self._held:
            factors[k] += next(numbers)
        falls = all(a > b for a, b in pairwise(times))
        if not falls or not all(map(math.isfinite, [*times, *weights, *factors])) or times[-1] < 1e-3:
            return None
        return self._with(times, weights, factors)

    @property
    def _times(self) -> tuple[float, ...]:
        return self.solver.times or ()

    @property
    def _held(self) -> list[int]:
        """Steps at which the difference of the branches is held, and its factor can be moved."""
        if not isinstance(self.guidance, ListedGuidance) or not self.guidance.factors:
            return []
        last = len(self._times) - 1
        return sorted(set(range(1, last + 1)) - {round(share * last) for share in self.guidance.at})

    def _parts(self) -> tuple[list[float], list[float], list[float]]:
        """Levels, weights and factors, to be changed by the caller."""
        factors = self.guidance.factors if isinstance(self.guidance, ListedGuidance) else ()
        return list(self._times), [weight for row in self.solver.weights or () for weight in row], list(factors)

    def _with(self, times: Sequence[float], weights: Sequence[float], factors: Sequence[float]) -> Few:
        left = iter(weights)
        rows = tuple(tuple(next(left) for _ in row) for row in self.solver.weights or ())
        solver = self.solver.model_copy(update={"times": tuple(times), "weights": rows})
        if not factors or self.guidance is None:
            return Few(solver, self.guidance)
        return Few(solver, self.guidance.model_copy(update={"factors": tuple(factors)}))


def start(levels: Sequence[float], num: int, name: str, guidance: Guidance | None = None) -> Few:
    """A run of `num` evaluations where the plain run passes at even steps, by the Adams-Bashforth rule of two values."""
    times = [levels[round(k * len(levels) / num)] for k in range(num)]
    rows: list[tuple[float, ...]] = [(1.0,)]
    for k in range(1, num):
        after = times[k + 1] if k + 1 < num else 0.0
        half = (times[k] - after) / (times[k - 1] - times[k]) / 2
        rows.append((1 + half, -half, *[0.0] * MEMORY)[: min(k + 1, MEMORY)])
    return Few(Solver.model_validate({"name": name, "times": times, "weights": rows}), guidance).told
