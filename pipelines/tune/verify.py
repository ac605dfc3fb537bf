"""Held-out prompts decide: what was fastest on the tuning prompts is measured again on others, beside the controls."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten import metrics
from hasten.pipelines.bench.bars import SETTING
from hasten.pipelines.bench.candidates import Candidate
from hasten.pipelines.bench.shots import Sample, shoot
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.space import parts_alone
from hasten.pipelines.tune.study import Trial
from hasten.pipelines.tune.trials import Bench, Measured
from hasten.recipe import Recipe
from hasten.samplers.solver import Solver

NEEDED = 0.95
"""Share of held-out samples that must keep the budget."""

CLOCK = 1.25
"""What is slower by no more than this on the tuning samples, with fewer evaluations, may be faster: the clock has noise, counting
has none."""

ROUNDS = 1000

THIN = 2
"""Every so many settings of each peer are measured."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A trial on the held-out samples."""

    trial: Trial
    measured: Measured

    def holds(self, goal: Goal) -> bool:
        return self.measured.whole and self.measured.kept(goal) >= NEEDED


def finalists(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """Those that keep the budget on every tuning sample, fastest first; of `trials.MANY` samples or more, on all but one: there,
    held-out prompts decide."""
    return sorted((trial for trial in trials if trial.measured.nearly(goal)), key=lambda trial: -trial.measured.speedup)


def promising(trial: Trial, failed: Sequence[Trial], goal: Goal) -> bool:
    """Whether a finalist was better on some tuning sample than each of those that failed on held-out ones. What was faster and
    nowhere worse has failed already. (The worst sample alone would not do: with few samples it is a matter of luck, and what was
    fitted to them looks better there than it is.)"""
    return all(any(mine > theirs for mine, theirs in zip(_levels(trial, goal), _levels(other, goal), strict=False)) for other in failed)


def _levels(trial: Trial, goal: Goal) -> list[float]:
    """How good each sample is, more is better; minus infinity where nothing could be measured."""
    found = [each.value(goal) for each in trial.measured.outcomes]
    return [-math.inf if value is None else goal.better(value) for value in found]


def close(trial: Trial, chosen: Trial) -> bool:
    """Whether a finalist may be faster than one that was measured to be faster than it."""
    fewer = trial.measured.nfe < chosen.measured.nfe
    return fewer and trial.measured.speedup * CLOCK > chosen.measured.speedup


def is_control(trial: Trial) -> bool:
    """Is it nothing but fewer steps of a solver? Then it is the control that a composition must beat."""
    sampler = trial.recipe.sampler
    return set(trial.recipe.axes) == {"sampler"} and isinstance(sampler, Solver) and sampler.weights is None


def verified(
    bench: Bench, candidates: Sequence[Trial], goal: Goal, until: Callable[[], bool], told: Callable[[Verdict], None] = lambda _: None
) -> list[Verdict]:
    """The candidates on held-out samples, in order, until one keeps the budget there; after that only those that are `close` to
    it. Ends where `until` says that time is over. Left out is what is not `promising`."""
    found: list[Verdict] = []
    for trial in candidates:
        holding = [verdict.trial for verdict in found if verdict.holds(goal)]
        failed = [verdict.trial for verdict in found if not verdict.holds(goal)]
        if not promising(trial, failed, goal) or not all(close(trial, other) for other in holding):
            continue
        found.append(Verdict(trial, bench.measure(trial.recipe.name, trial.recipe, again=True)))
        told(found[-1])
        if until():
            break
    return found


def fastest(verdicts: Sequence[Verdict], goal: Goal) -> Verdict | None:
    """Of those that keep the budget on the held-out samples, the one that was fastest there; None where none keeps it."""
    return max((each for each in verdicts if each.holds(goal)), key=lambda each: each.measured.speedup, default=None)


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

    def told(self) -> str:
        """A sentence for a reader."""
        kind = "super-additive" if self.ratio > 1.1 else "sub-additive" if self.ratio < 0.9 else "additive"
        return f"{self.axes[0]} and {self.axes[1]} together cost {self.ratio:.2g} times what they cost alone (squared latent error): {kind}."


def interactions(bench: Bench, recipe: Recipe, until: Callable[[], bool] = lambda: False) -> list[Interaction]:
    """Each pair of the recipe's axes, measured on the bench's samples: alone and together. None for a single axis, and none for
    a student, whose adapter and sampler mean nothing without each other. until: True ends it with the pairs so far."""
    if recipe.adapter is not None:
        return []
    parts = parts_alone(recipe)
    axes = list(parts)
    alone = {axis: _squared(bench.measure(f"{axis} alone", parts[axis])) for axis in axes} if len(axes) > 1 else {}
    found: list[Interaction] = []
    for i, one in enumerate(axes):
        for other in axes[i + 1 :]:
            if until():
                return found
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


def against(
    bench: Bench, peers: Sequence[Candidate], goal: Goal, until: Callable[[], bool], say: Callable[[str], None] = lambda _: None
) -> tuple[list[Measured], int]:
    """Other libraries' caches on the bench's samples, until the time is over; and how many were left out then. One that is far
    from the goal on the first sample, refused or absent is in the list with its reason."""
    found: list[Measured] = []
    for number, peer in enumerate(peers):
        if until():
            return found, len(peers) - number
        found.append(bench.measure(peer.recipe, peer, goal, again=True))
        say(f"Peer: {peer.recipe}: {found[-1].why or f'{found[-1].speedup:.2f}x, {found[-1].kept(goal):.0%} keep {goal}'}")
    return found, 0


def in_turn(peers: Sequence[Candidate]) -> list[Candidate]:
    """The first setting of every family, then the second of every family, and so on: where the time ends, each was heard."""
    families: dict[str, list[Candidate]] = {}
    for peer in peers:
        families.setdefault(peer.recipe.partition(SETTING)[0], []).append(peer)
    rounds = itertools.zip_longest(*families.values())
    return [peer for settings in rounds for peer in settings if peer is not None]


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
