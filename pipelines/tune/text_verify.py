"""Held-out prompts decide for texts: share of equal answers with its interval, controls, and what pairs of axes lose together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten.pipelines.tune.space import parts_alone
from hasten.pipelines.tune.text_goal import TextGoal
from hasten.pipelines.tune.text_study import TextTrial
from hasten.pipelines.tune.text_trials import TextBench, TextMeasured
from hasten.recipe import Recipe
from hasten.samplers.commit import Quota, Unmask

TIMED = 3
"""Batches of held-out prompts beside which sequential decoding is timed again."""

CERTAIN = 1.1
"""Speed-up that clocks do not make up, where as much is computed as before."""


@dataclass(frozen=True, slots=True)
class TextVerdict:
    """A trial on the held-out prompts. looks: how many trials had been looked at there by then, this one included."""

    trial: TextTrial
    measured: TextMeasured
    looks: int = 1

    def holds(self, goal: TextGoal) -> bool:
        """Does it save time, and is the share of equal texts enough, among the prompts at hand?"""
        return self.measured.whole and goal.met(self.measured.share) and saves(self.measured)

    def shown(self, goal: TextGoal) -> bool:
        """Do the prompts show it: does even the low end of the interval keep the goal?"""
        return self.measured.whole and self.interval[0] >= goal.limit

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true share may lie, allowing for the looks: the k-th spends 1 / (k (k + 1)) of 5 % on either side, which for
        the first is the usual 95 %, and for however many together never more than 5 %."""
        return self.measured.interval(1 - 0.1 / (self.looks * (self.looks + 1)))


def saves(measured: TextMeasured) -> bool:
    """Is it faster than sequential decoding, by more than clocks err where it does not do less?"""
    return measured.speedup > (1.0 if measured.work < 0.98 else CERTAIN)


def text_finalists(trials: Sequence[TextTrial], goal: TextGoal) -> list[TextTrial]:
    """Those that save time and keep the budget on the tuning prompts, fastest first."""
    kept = [each for each in trials if goal.met(each.measured.share) and saves(each.measured)]
    return sorted(kept, key=lambda each: -each.measured.speedup)


def text_verified(
    bench: TextBench, candidates: Sequence[TextTrial], goal: TextGoal, until: Callable[[], bool], wanted: int = 1,
    told: Callable[[TextVerdict], None] = lambda _: None, before: int = 0,
) -> list[TextVerdict]:  # fmt: skip
    """The candidates on held-out prompts, in order, until `wanted` of them keep the budget there, or `until` says that time is
    over. before: looks that were made already."""
    found: list[TextVerdict] = []
    for trial in candidates:
        measured = bench.measure(trial.recipe.name, trial.recipe, goal, again=TIMED)
        found.append(TextVerdict(trial, measured, before + len(found) + 1))
        told(found[-1])
        if sum(verdict.holds(goal) for verdict in found) >= wanted or until():
            break
    return found


def is_fewer(recipe: Recipe) -> bool:
    """Is it nothing but the surest k slots per evaluation?"""
    return set(recipe.axes) == {"commit"} and isinstance(recipe.commit, Unmask) and isinstance(recipe.commit.rule, Quota)


def is_single(recipe: Recipe) -> bool:
    """Does it change one axis of sequential decoding?"""
    return len(recipe.axes) == 1


@dataclass(frozen=True, slots=True)
class Losses:
    """What two axes lose together. alone: other texts with each on its own; together: with both; prompts: of so many."""

    axes: tuple[str, str]
    alone: tuple[int, int]
    together: int
    prompts: int

    @property
    def ratio(self) -> float | None:
        """Together over the sum of both: above 1 the pair loses more than its parts. None where neither loses anything."""
        return self.together / sum(self.alone) if sum(self.alone) else None

    def __str__(self) -> str:
        one, other = self.axes
        verdict = "" if self.ratio is None else f", {self.ratio:.2g} times the sum"
        return f"{one} alone changes {self.alone[0]} of {self.prompts} texts, {other} {self.alone[1]}, both {self.together}{verdict}"


def losses(bench: TextBench, recipe: Recipe, until: Callable[[], bool]) -> list[Losses]:
    """Each pair of the recipe's axes, alone and together, on the bench's prompts; pairs that are refused without the rest of the
    recipe are left out. None for a single axis."""
    if len(recipe.axes) < 2:
        return []
    parts = parts_alone(recipe)
    alone: dict[str, TextMeasured] = {}
    for axis, part in parts.items():
        if until():
            return []
        alone[axis] = bench.measure(f"{axis} alone", part)
    found = []
    axes = list(parts)
    for one, other in ((a, b) for number, a in enumerate(axes) for b in axes[number + 1 :]):
        if until():
            break
        both = bench.measure(f"{one} and {other}", recipe if len(axes) == 2 else parts[one] | parts[other])
        if alone[one].whole and alone[other].whole and both.whole:
            lost = [len(each.outcomes) - each.same for each in (alone[one], alone[other], both)]
            found.append(Losses((one, other), (lost[0], lost[1]), lost[2], len(both.outcomes)))
    return found
