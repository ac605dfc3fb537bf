"""Held-out prompts decide: what was fastest on the tuning prompts is measured again on others, beside the controls."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten import metrics
from hasten.pipelines.bench.shots import Sample, shoot
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.space import parts_alone
from hasten.pipelines.tune.study import Trial
from hasten.pipelines.tune.trials import Bench, Measured
from hasten.recipe import Recipe

NEEDED = 0.95
"""Share of held-out samples that must keep the budget."""

ROUNDS = 1000


@dataclass(frozen=True, slots=True)
class Verdict:
    """A trial on the held-out samples."""

    trial: Trial
    measured: Measured

    def holds(self, goal: Goal) -> bool:
        return self.measured.whole and self.measured.kept(goal) >= NEEDED


def finalists(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """Those that keep the budget on every tuning sample, fastest first."""
    kept = [trial for trial in trials if trial.measured.kept(goal) == 1]
    return sorted(kept, key=lambda trial: -trial.measured.speedup)


def verified(
    bench: Bench, candidates: Sequence[Trial], goal: Goal, until: Callable[[], bool], told: Callable[[Verdict], None] = lambda _: None
) -> list[Verdict]:
    """The candidates on held-out samples, in order, until one keeps the budget there, or `until` says that time is over."""
    found: list[Verdict] = []
    for trial in candidates:
        found.append(Verdict(trial, bench.measure(trial.recipe.name, trial.recipe, again=True)))
        told(found[-1])
        if found[-1].holds(goal) or until():
            break
    return found


@dataclass(frozen=True, slots=True)
class Interaction:
    """What two axes cost together. alone: mean squared latent error of each on its own. together: of both. ratio: together
    over the sum of both; above 1 the pair costs more than its parts (super-additive)."""

    axes: tuple[str, str]
    alone: tuple[float, float]
    together: float

    @property
    def ratio(self) -> float:
        return self.together / max(sum(self.alone), 1e-12)


def interactions(bench: Bench, recipe: Recipe) -> list[Interaction]:
    """Each pair of the recipe's axes, measured on the bench's samples: alone and together. None for a single axis."""
    parts = parts_alone(recipe)
    axes = list(parts)
    alone = {axis: _squared(bench.measure(f"{axis} alone", parts[axis])) for axis in axes} if len(axes) > 1 else {}
    found = []
    for i, one in enumerate(axes):
        for other in axes[i + 1 :]:
            both = recipe if len(axes) == 2 else parts[one] | parts[other]
            together = _squared(bench.measure(f"{one} and {other}", both))
            known = alone[one], alone[other], together
            if None not in known:
                found.append(Interaction((one, other), (known[0], known[1]), known[2]))  # type: ignore[arg-type]
    return found


def _squared(measured: Measured) -> float | None:
    """Mean squared latent error; None where a run failed or its latents are not known."""
    known = [each.latent_error**2 for each in measured.outcomes if each.latent_error is not None]
    return statistics.fmean(known) if measured.whole and len(known) == len(measured.outcomes) else None


def noise_floor(bench: Bench, sample: Sample) -> float | None:
    """PSNR in dB between two plain runs of one prompt with different seeds: what likeness is without any common noise."""
    other = shoot(bench.pipe, Sample(sample.prompt, sample.seed + 7919), bench.call)
    return float(metrics.psnr(bench.plain[bench.samples.index(sample)].frames, other.frames))


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of their median by resampling with replacement; None for fewer than three."""
    if len(values) < 3:
        return None
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(ROUNDS))
    return medians[int(0.025 * ROUNDS)], medians[int(0.975 * ROUNDS) - 1]
