"""`hasten.tune`: from a pipeline, some prompts, a budget and some minutes to a recipe that was checked on other prompts."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.atomic import atomic_write
from hasten.budget import Budget
from hasten.errors import UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.bench.shots import Sample, shoot
from hasten.pipelines.host import denoisers
from hasten.pipelines.tune import fingerprint
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.result import Tuned, stamped
from hasten.pipelines.tune.signals import Recorder, Signals, recording
from hasten.pipelines.tune.space import Space
from hasten.pipelines.tune.study import Study, Trial
from hasten.pipelines.tune.trials import Bench
from hasten.pipelines.tune.verify import Verdict, finalists, interactions, noise_floor, verified

SEARCHING = 0.7
"""Share of the time that goes into plain runs and trials; the rest belongs to held-out prompts and controls."""

RECORDED = 3
"""Tuning samples whose plain runs are recorded for judging schedules."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What is tuned for what. prompts: (text, seed) each, at least four; every third is held out. seconds: for everything.

    peers: also measure the caches of diffusers and cache-dit on the held-out prompts. attention, adapters, presets: recipes
    that are searched besides.
    """

    goal: Goal
    prompts: tuple[tuple[str, int], ...]
    call: dict[str, Any]
    seconds: float
    model: str = ""
    peers: bool = False
    attention: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    presets: tuple[str, ...] = ("balanced", "auto", "easycache-forecast")
    seed: int = 0

    def samples(self, most: int) -> tuple[list[Sample], list[Sample]]:
        """(tuning samples, held-out ones), at most so many of each."""
        held = [Sample(*pair) for pair in self.prompts[2::3]]
        tuning = [Sample(*pair) for number, pair in enumerate(self.prompts) if number % 3 != 2]
        return tuning[:most], held[: max(3, most)]


def tune(
    pipe: Any, prompts: Sequence[str | tuple[str, int]], budget: str | Budget, *, seconds: float = 600.0,
    study: str | Path = "hasten-study", out: str | Path | None = None, model: str = "", call: dict[str, Any] | None = None,
    peers: bool = False, attention: Sequence[str] = (), adapters: Sequence[str] = (), seed: int = 0, say: Say = lambda text: None,
) -> Tuned:  # fmt: skip
    """Search the fastest composition of solver, steps, guidance, cache and what is given that keeps `budget` on `prompts`.

    pipe: a diffusers pipeline. prompts: at least four, or (prompt, seed) pairs; every third is held out and decides at the
    end. budget: `"psnr>=30"`, `"latent_error<=0.05"`, `"ssim>=0.98"`, or a `Budget`. study: folder of the journal; a study in
    it is continued. out: where the recipe is written, with its stamp. call: arguments of the pipeline's call, those of a
    bundled model by themselves. attention: recipes of sparse attention that may be added; adapters: recipes of students.

    Raises `UsageError` for what cannot be searched, `ResumeError` where the folder has a study of something else.
    """
    pairs = tuple(pair if isinstance(pair, tuple) else (pair, number) for number, pair in enumerate(prompts))
    if len(pairs) < 4:
        raise UsageError(f"Tuning needs at least 4 prompts, of which every third is held out, got {len(pairs)}.")
    wanted = Goal.read(budget)
    job = Job(
        wanted, pairs, tiny_models.call_defaults(pipe) | (call or {}), seconds, model, peers, tuple(attention), tuple(adapters),
        seed=seed,
    )  # fmt: skip
    if "num_inference_steps" not in job.call:
        raise UsageError("Say with how many steps the plain run is made: call={'num_inference_steps': 50}, or --steps 50.")
    found = Tuning(pipe, job, Path(study), say).run()
    if out is not None and found.recipe is not None:
        atomic_write(Path(out), found.recipe.to_yaml().encode())
        say(f"The recipe is in {out}.")
    return found


class Tuning:
    """One tuning from its first plain run to the stamp."""

    def __init__(self, pipe: Any, job: Job, folder: Path, say: Say) -> None:
        self.pipe, self.job, self.say = pipe, job, say
        self.began = time.monotonic()
        self.weights = fingerprint.of_weights(denoisers(pipe))
        identity = {
            "model": job.model, "weights": self.weights, "scheduler": type(pipe.scheduler).__name__,
            "call": {k: v for k, v in job.call.items() if isinstance(v, str | int | float | bool | type(None))},
            "prompts": [list(pair) for pair in job.prompts], "budget": str(job.goal),
            "attention": list(job.attention), "adapters": list(job.adapters),
        }  # fmt: skip
        self.study = Study(folder, job.goal, identity, job.seed)
        self.recorders: list[Recorder] = []
        self.held: list[Sample] = []

    def run(self) -> Tuned:
        """Search, then let held-out prompts decide."""
        trials, space, bench = self.searched()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Tuned(self.job.goal, trials, [], plain_seconds=bench.seconds)
            found.why += self._remarks(space)
            self._verify(found, Bench(self.pipe, self.job.call, self.held), bench)
        found.spent = self.used()
        return found

    def searched(self, tolerances: Sequence[float] = (), share: float = SEARCHING) -> tuple[list[Trial], Space, Bench]:
        """The trials, what was searched, and the tuning samples' bench, after `share` of the time. tolerances: latent errors to
        begin with, instead of the goal's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a trial has to say is in its outcome
            tuning, self.held = self.job.samples(self._affordable())
            self.say(f"Plain runs of {len(tuning)} tuning prompts; {len(self.held)} others are held out.")
            bench = Bench(self.pipe, self.job.call, tuning, self._recorded)
            space = self._space()
            self.study.search(bench, space, share * self.job.seconds - self.used(), self._told, tolerances)
            return self.study.trials(), space, bench

    def _affordable(self) -> int:
        """Samples of each kind for which the time is enough: plain runs take at most a sixth of it."""
        sample = Sample(*self.job.prompts[0])
        shoot(self.pipe, sample, {**self.job.call, "num_inference_steps": 4})
        seconds = shoot(self.pipe, sample, {**self.job.call, "num_inference_steps": 8}).seconds * self.job.call["num_inference_steps"] / 8
        return int(min(8, max(2, self.job.seconds / 6 / (3 * seconds))))

    @contextlib.contextmanager
    def _recorded(self, number: int) -> Iterator[None]:
        if number >= RECORDED:
            yield
            return
        guided = not self.recorders or self.recorders[0].guided
        with recording(self.pipe, guided) as recorder:
            yield
        self.recorders.append(recorder)

    def _space(self) -> Space:
        signals: list[Signals] = [recorder.found for recorder in self.recorders if recorder.found is not None]
        alike = bool(signals) and all(each.times == signals[0].times and each.scale is not None for each in signals)
        alike = alike or (bool(signals) and all(each.times == signals[0].times and each.scale is None for each in signals))
        steps = self.recorders[0].steps if self.recorders else self.job.call["num_inference_steps"]
        presets = self.job.presets
        return Space(steps, self.recorders[0].guided, signals if alike else (), self.job.attention, self.job.adapters, presets)

    def _remarks(self, space: Space) -> list[str]:
        found = []
        if not space.signals:
            found.append(f"Schedules could not be judged beforehand: {self.recorders[0].why}. Only whole families were searched.")
        if not space.guided:
            found.append("The pipeline evaluates one branch per step, so guidance was not searched.")
        return found

    def used(self) -> float:
        """Seconds since this tuning began."""
        return time.monotonic() - self.began

    def _told(self, trial: Trial) -> None:
        measured, goal = trial.measured, self.job.goal
        result = measured.why or f"{measured.speedup:.2f}x, worst {goal.measure} {measured.worst(goal):.4g}"
        self.say(f"{trial.number + 1}. {trial.recipe.name}: {result}")

    # --- at the end -------------------------------------------------------------------------------

    def _verify(self, found: Tuned, held: Bench, tuning: Bench) -> None:
        goal = found.goal

        def over() -> bool:
            return self.used() > 0.93 * self.job.seconds

        ready = finalists(found.trials, goal)
        if not ready:
            found.why.append(f"Nothing that was tried keeps {goal} on every tuning prompt. Allow more time, or a lower budget.")
            return
        self.say(f"{len(ready)} compositions keep {goal} on the tuning prompts; the fastest meet {len(held.samples)} others.")
        found.verdicts = verified(held, ready, goal, over, self._verdict)
        found.best = next((verdict for verdict in found.verdicts if verdict.holds(goal)), None)
        steps = [trial for trial in ready if _is_control(trial)]
        found.control = next((v for v in verified(held, steps[:3], goal, over, self._verdict) if v.holds(goal)), None)
        found.noise_floor = noise_floor(held, held.samples[0])
        if found.best is None:
            found.why.append(f"No composition kept {goal} on {len(held.samples)} held-out prompts in time. Allow more time, or prompts.")
            return
        if found.control is not None and found.control.measured.speedup > found.best.measured.speedup:
            found.best = found.control
        if _is_control(found.best.trial):
            found.why.append("Fewer steps with a better solver won: no composition was faster within the budget.")
        if not over():
            few = Bench(self.pipe, self.job.call, tuning.samples[:2])
            found.interactions = interactions(few, found.best.trial.recipe)
        found.recipe = stamped(found.best, goal, self._here(), self.job.model)

    def _verdict(self, verdict: Verdict) -> None:
        measured, goal = verdict.measured, self.job.goal
        self.say(f"Held out: {measured.name}: {measured.speedup:.2f}x, {measured.kept(goal):.0%} keep {goal}, worst {measured.worst(goal):.4g}")

    def _here(self) -> dict[str, Any]:
        first = self.recorders[0]
        return fingerprint.known_by(denoisers(self.pipe)) | {
            "scheduler": type(self.pipe.scheduler).__name__, "steps": first.steps, "shape": first.shape,
        }  # fmt: skip


def _is_control(trial: Trial) -> bool:
    """Is it nothing but fewer steps of a solver?"""
    return set(trial.recipe.axes) == {"sampler"}
