"""What a recipe costs and keeps on some samples, beside plain runs with the same noise.

The distance of the latents comes first, on one sample and without decoding; only what is near enough there runs on all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hasten import metrics
from hasten.errors import RefusedError
from hasten.pipelines.bench.candidates import Candidate, ours
from hasten.pipelines.bench.foreign import because
from hasten.pipelines.bench.shots import Sample, Shot, shoot
from hasten.pipelines.tune.goal import Goal
from hasten.recipe import Recipe

MANY = 6
"""Samples of which one may miss the budget while tuning."""

FAR = 4.0
"""How many times the tolerated latent error a first sample may be off before the others are spared."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run beside the plain run of its sample. psnr: None where identical."""

    speedup: float
    seconds: float
    psnr: float | None
    ssim: float | None
    latent_error: float | None
    nfe: float | None
    bytes_held: int | None

    def value(self, goal: Goal) -> float | None:
        """What the goal measures; infinite dB where identical."""
        if goal.measure == "psnr":
            return math.inf if self.psnr is None else self.psnr
        return self.ssim if goal.measure == "ssim" else self.latent_error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Measured:
    """A recipe on samples. outcomes: in their order; fewer of them where it was given up. why: the reason then."""

    name: str
    outcomes: tuple[Outcome, ...]
    why: str = ""

    @property
    def whole(self) -> bool:
        return bool(self.outcomes) and not self.why

    @property
    def speedup(self) -> float:
        return statistics.median(each.speedup for each in self.outcomes)

    @property
    def nfe(self) -> float:
        """Evaluations, the median; infinite where they were not counted."""
        known = [each.nfe for each in self.outcomes if each.nfe is not None]
        return statistics.median(known) if known else math.inf

    def nearly(self, goal: Goal) -> bool:
        """Whether it keeps the goal on every sample, or of `MANY` or more on all but one.

        Some seeds stand on the edge between two pictures, and nearly every way of saving steps takes them over it. One such
        must not decide alone.
        """
        return self.whole and goal.met(self.counted(goal))

    def counted(self, goal: Goal) -> float:
        """The worst value that counts for that: of `MANY` samples or more the second worst."""
        bad = math.inf if goal.measure == "latent_error" else -math.inf
        values = [each.value(goal) for each in self.outcomes]
        ordered = sorted((bad if value is None else value for value in values), key=goal.better)
        return ordered[len(ordered) >= MANY]

    def worst(self, goal: Goal) -> float:
        """The worst value over the samples; minus infinity (or infinity, of an error) where one cannot be measured."""
        values = [each.value(goal) for each in self.outcomes]
        known = [value for value in values if value is not None]
        bad = math.inf if goal.measure == "latent_error" else -math.inf
        return min(known, key=goal.better) if len(known) == len(values) and known else bad

    def median(self, goal: Goal) -> float | None:
        known = [value for each in self.outcomes if (value := each.value(goal)) is not None]
        return statistics.median(known) if known else None

    def kept(self, goal: Goal) -> float:
        """Share of the samples that keep the goal."""
        return statistics.fmean(goal.met(each.value(goal)) for each in self.outcomes) if self.outcomes else 0.0


class Bench:
    """Plain runs of some samples, made once, and runs of recipes beside them.

    context: called with each sample's number to give a context (a recording) in which a further plain run of it is made.
    retimed: recipes after which a plain run is timed again. pace: what that took, relative to when it was first timed. nfe: of
    a plain run, about.

    Raises `RefusedError` where a plain run's result is not finite: there is nothing to compare with.
    """

    def __init__(self, pipe: Any, call: dict[str, Any], samples: Sequence[Sample], context: Callable[[int], Any] | None = None) -> None:
        self.pipe, self.call, self.samples = pipe, call, tuple(samples)
        self.plain: list[Shot] = []
        self.pace, self.retimed, self._measured = 1.0, 8, 0
        steps = call.get("num_inference_steps", 4)
        few = shoot(pipe, samples[0], {**call, "num_inference_steps": min(4, steps)}, ours("plain", "plain"))
        self.nfe = (few.nfe or 0) / min(4, steps) * steps
        for number, sample in enumerate(samples):
            if context is not None:
                with context(number):
                    shoot(pipe, sample, call)
            self.plain.append(self._plain(sample))
            if not np.isfinite(self.plain[-1].frames).all():
                raise RefusedError(
                    f"The plain run of {sample.prompt!r} gives NaN or infinity, so nothing can be compared with it. Try another --dtype."
                )

    def _plain(self, sample: Sample) -> Shot:
        """The run without anything, timed without a recorder beside it."""
        return shoot(self.pipe, sample, self.call)

    def _keep_pace(self) -> None:
        """Time the first plain run again after every `retimed` recipes: machines change their pace, and what is tried later must
        not look faster for it."""
        self._measured += 1
        if self._measured % self.retimed == 0:
            self.pace = self.cost(self._plain(self.samples[0])) / self.cost(self.plain[0])

    @property
    def seconds(self) -> float:
        """Of a plain run."""
        return statistics.median(self.cost(shot) for shot in self.plain)

    def cost(self, shot: Shot) -> float:
        """What a run took: wall seconds; processor seconds where one thread of the CPU does everything, which other programs
        on the machine do not change."""
        alone = str(getattr(self.pipe, "device", "cpu")) == "cpu" and torch.get_num_threads() == 1
        return shot.busy if alone else shot.seconds

    def measure(
        self, name: str, recipe: Recipe | Candidate, goal: Goal | None = None, again: bool = False,
        until: Callable[[Sequence[Outcome]], str] = lambda outcomes: "",
    ) -> Measured:  # fmt: skip
        """`recipe` on all samples. goal: give up after the first sample if that is far from it, or slower than the plain run.
        again: time the plain run again beside each run, for numbers that are to be believed to the last per cent. until: asked
        after each sample: why it is given up, "" to go on."""
        self._keep_pace()
        candidate = recipe if isinstance(recipe, Candidate) else ours(name, recipe)
        found: list[Outcome] = []
        for number, sample in enumerate(self.samples):
            before = self.cost(self._plain(sample)) if again else self.pace * self.cost(self.plain[number])
            try:
                shot = shoot(self.pipe, sample, self.call, candidate)
                if number == 0 and goal is not None and self.cost(shot) > before:  # the first of its kind loads what it needs
                    shot = shoot(self.pipe, sample, self.call, candidate)
                found.append(outcome(self.plain[number], shot, before, self.cost(shot)))  # refuses NaN
            except Exception as error:  # noqa: BLE001 - whatever it raises is the reason that is reported
                return Measured(name, tuple(found), because(error))
            if goal is not None and number == 0 and (why := _hopeless(found[0], goal)):
                return Measured(name, tuple(found), why)
            if number + 1 < len(self.samples) and (why := until(found)):
                return Measured(name, tuple(found), f"given up after {number + 1} of {len(self.samples)} samples: {why}")
        return Measured(name, tuple(found), self._inert(found) if goal is not None else "")

    def _inert(self, found: Sequence[Outcome]) -> str:
        """Why a recipe that left out nothing is none; "" for others. The clock may call it faster."""
        every = all(each.psnr is None and each.nfe is not None and each.nfe >= 0.999 * self.nfe for each in found)
        return "it left out nothing: results and evaluations are those of the plain run" if every else ""


def outcome(plain: Shot, shot: Shot, before: float, seconds: float) -> Outcome:
    """A run beside the plain run of its sample. before: what the plain run next to it in time took; seconds: it itself."""
    psnr = metrics.psnr(plain.frames, shot.frames)
    known = plain.latents is not None and shot.latents is not None
    small = min(plain.frames.shape[1:3]) < 11
    return Outcome(
        before / seconds, seconds, psnr if math.isfinite(psnr) else None,
        None if small else metrics.ssim(plain.frames, shot.frames),
        metrics.latent_error(shot.latents, plain.latents) if known else None, shot.nfe, shot.bytes_held,
    )  # fmt: skip


def _hopeless(first: Outcome, goal: Goal) -> str:
    """Why the other samples are spared; "" where they are not."""
    if first.speedup < 1:
        return f"slower than the plain run on the first sample ({first.speedup:.2f}x)"
    value = first.value(goal)
    if value is None or math.isnan(value):
        return "the first sample's result cannot be measured"
    far = {"psnr": goal.limit - 20 * math.log10(FAR), "ssim": 1 - FAR * (1 - goal.limit), "latent_error": FAR * goal.limit}
    if goal.better(value) < goal.better(far[goal.measure]):
        return f"far from the budget on the first sample ({goal.measure} {value:.4g})"
    return ""
