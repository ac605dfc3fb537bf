"""Schedules worth trying: which steps evaluate the network, and which of those the unconditional branch, too.

Both are searched together on recorded runs (`signals`), for as many evaluations as one names, before anything is run: a
composition of cache and guidance that spends one budget where it is cheapest.

Shapes: N steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Listed, Spread
from hasten.forecast import Forecast, Polynomial
from hasten.ledger import PATH
from hasten.pipelines.tune.signals import Signals, predicted
from hasten.recipe import Guidance, Recipe
from hasten.samplers.guidance import ListedGuidance

FORECASTS: tuple[tuple[Forecast, int, int], ...] = (
    (Polynomial(order=1, damp=0.75), 2, 1), (Polynomial(order=1, damp=0.75), 2, 0), (Polynomial(order=1), 2, 1),
    (Polynomial(order=1, damp=0.5), 2, 0),
)  # fmt: skip
"""Forecasts, degrees of their correction and orders of guidance's own that schedules are searched for. Higher orders predict recorded runs as well, and
fail on the model: what they extrapolate wrongly, the network amplifies."""


@dataclass(frozen=True, slots=True)
class Plan:
    """steps: indices of N that evaluate the network; guided: those of them that evaluate both branches, None where the host
    has one. error: predicted distance to the plain run, the mean square over the recordings."""

    total: int
    steps: frozenset[int]
    guided: frozenset[int] | None
    forecast: Forecast
    correct: int
    order: int = 1
    error: float = 0.0

    @property
    def evaluations(self) -> int:
        """Of the network, a branch counted as one."""
        return len(self.steps) + len(self.guided or ())

    def reuse(self) -> NetworkReuse:
        return NetworkReuse(rule=Listed(at=self._shares(self.steps)), forecast=self.forecast, correct=self.correct)

    def guidance(self) -> Guidance | None:
        """None where every evaluated step is guided."""
        if self.guided is None or self.guided == self.steps:
            return None
        return ListedGuidance(at=self._shares(self.guided), order=self.order)

    def recipe(self) -> Recipe:
        return Recipe(reuse=self.reuse(), guidance=self.guidance())

    def _shares(self, indices: frozenset[int]) -> tuple[float, ...]:
        return tuple(round(i / (self.total - 1), 4) for i in sorted(indices))


def judged(plan: Plan, runs: Sequence[Signals]) -> float:
    """The plan's error on `runs`, which were all made at the same times."""
    track = predicted(plan.reuse(), plan.guidance(), runs[0], set(plan.steps))
    return math.sqrt(sum(run.error(track) ** 2 for run in runs) / len(runs))


def best_plan(
    runs: Sequence[Signals], steps: int, guided: int | None, forecast: Forecast, correct: int, order: int = 1, *,
    rounds: int = 3, until: Callable[[], bool] = lambda: False,
) -> Plan:  # fmt: skip
    """The plan with so many evaluated `steps`, and `guided` of them with both branches, that moves the latents most nearly as
    the plain runs did, on the way, too. Coordinate descent from two starts: each position in turn to its best free place, then the guided
    ones. until: asked between moves; True ends the search with the best so far. Deterministic apart from that.

    Raises `ValueError` where there are not so many steps.
    """
    total = runs[0].total
    if not 1 <= steps <= total or (guided is not None and not 1 <= guided <= steps):
        raise ValueError(f"a plan of {steps} steps, {guided} of them guided, does not fit a run of {total}")

    @functools.cache
    def error(chosen: frozenset[int], both: frozenset[int] | None) -> float:
        return judged(Plan(total, chosen, both, forecast, correct, order), runs)

    found = []
    for chosen in _starts(total, steps, runs[0].times):
        both = None if guided is None else _some(chosen, guided)
        found.append(_descend(chosen, both, error, total, rounds, until))
    value, chosen, both = min(found, key=lambda each: each[0])
    return Plan(total, chosen, both, forecast, correct, order, value)


def _starts(total: int, steps: int, times: Sequence[float]) -> Iterator[frozenset[int]]:
    if steps >= 3:
        yield frozenset(Listed(at=PATH, share=steps / total).computed(total)) if steps < total else frozenset(range(total))
        yield frozenset(Spread(share=steps / total, ends=0.25, skew=1.2).computed(total, times))
    else:
        yield frozenset(round(k * total / steps) for k in range(steps))


def _some(chosen: frozenset[int], num: int) -> frozenset[int]:
    """`num` of them, the first always, denser at the start, where guidance decides what is drawn."""
    ordered = sorted(chosen)
    places = [round((k / max(1, num - 1)) ** 1.3 * (len(ordered) - 1)) for k in range(num)] if num > 1 else [0]
    found = dict.fromkeys(places)
    spare = (place for place in range(len(ordered)) if place not in found)
    while len(found) < num:
        found[next(spare)] = None
    return frozenset(ordered[place] for place in found)


Error = Callable[[frozenset[int], frozenset[int] | None], float]


def _descend(
    chosen: frozenset[int], both: frozenset[int] | None, error: Error, total: int, rounds: int, until: Callable[[], bool]
) -> tuple[float, frozenset[int], frozenset[int] | None]:
    best = error(chosen, both)
    for _ in range(rounds):
        before = best
        for index in sorted(chosen - {0}):
            for place in _between(chosen - {index}, index, total):
                steps, guided = chosen - {index} | {place}, _moved(both, index, place)
                if until():
                    return best, chosen, both
                if (value := error(steps, guided)) < best:
                    best, chosen, both, index = value, steps, guided, place
        for index in sorted((both or frozenset()) - {0}):
            for place in _nearest(chosen - (both or frozenset()), index):
                if (value := error(chosen, guided := _moved(both, index, place))) < best:
                    best, both, index = value, guided, place
        if best > before * (1 - 1e-3):
            break
    return best, chosen, both


def _between(others: frozenset[int], index: int, total: int) -> list[int]:
    """Free places between the neighbours of `index`, the nearest first, at most four on each side."""
    low = max(i for i in others if i < index) + 1
    high = min((i for i in others if i > index), default=total)
    return [place for place in sorted(range(low, high), key=lambda i: abs(i - index)) if 0 < abs(place - index) <= 4]


def _nearest(free: frozenset[int], index: int) -> list[int]:
    return sorted(free, key=lambda i: abs(i - index))[:2]


def _moved(indices: frozenset[int] | None, old: int, new: int) -> frozenset[int] | None:
    """The same with `new` in the place of `old`, where `old` is one of them."""
    if indices is None or old not in indices:
        return indices
    return indices - {old} | {new}
