"""`hasten.tune`: from a pipeline, some prompts, a budget and some minutes to a recipe that was checked on other prompts."""

from __future__ import annotations

import collections
import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from hasten.atomic import atomic_write
from hasten.budget import Budget
from hasten.errors import UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.asked import hearing
from hasten.pipelines.bench.peers import sweep
from hasten.pipelines.bench.shots import Sample, shoot
from hasten.pipelines.host import denoisers
from hasten.pipelines.tune import fingerprint, kept
from hasten.pipelines.tune.fitted import Fitting
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.job import Job
from hasten.pipelines.tune.result import Tuned, stamped
from hasten.pipelines.tune.signals import Recorder, Signals, recording
from hasten.pipelines.tune.space import Space
from hasten.pipelines.tune.study import Study, Trial
from hasten.pipelines.tune.trials import Bench
from hasten.pipelines.tune.verify import (
    NEEDED,
    THIN,
    Verdict,
    against,
    fastest,
    finalists,
    in_turn,
    interactions,
    is_control,
    noise_floor,
    verified,
)

if TYPE_CHECKING:
    from hasten.pipelines.text.pipeline import TextPipeline
    from hasten.pipelines.tune.text_result import TextTuned

SEARCHING = 0.7
"""Share of the time that goes into plain runs and trials; the rest belongs to held-out prompts and controls."""

WITH_PEERS = 0.5
"""The same where peers are measured, too."""

VERIFYING = 0.93
"""Share of the time after which nothing new begins."""

MOST = 12
"""Samples that are tuned on, at most."""

THINKING = 0.02
"""Share of the time that the search of one plan may take."""

FEW = 3
"""Held-out samples below which the verdict has no interval, and is told to be weak."""

UNFITTED = "No solver is fitted: the pipeline hands out no latents, or its plain run does not begin at nearly all noise."

RECORDED = 3
"""Tuning samples whose plain runs are recorded for judging schedules."""

Say = Callable[[str], None]


@overload
def tune(
    pipe: TextPipeline, prompts: Sequence[str | tuple[str, int]], budget: str | Budget, *, seconds: float = 600.0,
    study: str | Path = "hasten-study", out: str | Path | None = None, model: str = "", call: dict[str, Any] | None = None,
    seed: int = 0, keep: bool = True, say: Say = lambda text: None,
) -> TextTuned: ...  # fmt: skip
@overload
def tune(
    pipe: Any, prompts: Sequence[str | tuple[str, int]], budget: str | Budget, *, seconds: float = 600.0,
    study: str | Path = "hasten-study", out: str | Path | None = None, model: str = "", call: dict[str, Any] | None = None,
    peers: bool = False, attention: Sequence[str] = (), adapters: Sequence[str] = (), seed: int = 0, keep: bool = True,
    say: Say = lambda text: None,
) -> Tuned: ...  # fmt: skip
def tune(
    pipe: Any, prompts: Sequence[str | tuple[str, int]], budget: str | Budget, *, seconds: float = 600.0,
    study: str | Path = "hasten-study", out: str | Path | None = None, model: str = "", call: dict[str, Any] | None = None,
    peers: bool = False, attention: Sequence[str] = (), adapters: Sequence[str] = (), seed: int = 0, keep: bool = True,
    say: Say = lambda text: None,
) -> Tuned | TextTuned:  # fmt: skip
    """Search the fastest composition of solver, steps, guidance and cache that keeps `budget` on `prompts`.

    pipe: a diffusers pipeline, which is left as it was. prompts: at least four, seeds counted from 0, or (prompt, seed) pairs;
    every third is held out and decides at the end. budget: `"psnr>=30"`, `"latent_error<=0.05"`, `"ssim>=0.98"` against the
    plain run, or a `Budget`. seconds: for everything.

    study: folder of the journal. What an earlier process has searched there is gone on with, also after kill -9, and its time
    counts; processes that run at once share the search. out: where the recipe is written, with a stamp of what it was
    measured on. model: its name, for the stamp. call: arguments of the pipeline's call; a bundled model knows its own.
    attention: recipes of sparse attention that may be added. adapters: recipes of students, names or files. peers: measure the
    caches of diffusers and cache-dit, too. seed: of the search. keep: put a copy where a `Budget` on this
    host finds it (`tune.kept`). say: is told each result, a line each.

    The result's `recipe` is None where nothing kept the budget; its `why` says what else is to be known.

    A `TextDiffusionPipeline` is tuned by what `text_run.tune_text` says: budget `"exact_match>=0.99"` of sequential decoding.

    Raises `UsageError` for what cannot be searched, `ResumeError` where the folder has a study of something else,
    `RefusedError` where the plain run itself fails.
    """
    if any(kind.__name__ in ("TextPipeline", "PreTrainedModel") for kind in type(pipe).__mro__):  # so that nothing is imported for it
        from hasten.pipelines.tune.text_run import tune_text

        if peers or attention or adapters:
            raise UsageError("peers, attention and adapters are for pictures and clips, and this model writes texts. Leave them out.")
        return tune_text(pipe, prompts, budget, seconds=seconds, study=study, out=out, model=model, call=call, seed=seed, keep=keep, say=say)
    pairs = tuple(pair if isinstance(pair, tuple) else (pair, number) for number, pair in enumerate(prompts))
    job = Job(
        Goal.read(budget), pairs, tiny_models.call_defaults(pipe) | (call or {}), seconds, model, peers, tuple(attention),
        tuple(adapters), seed=seed,
    )  # fmt: skip
    found = Tuning(pipe, job, Path(study), say).run()
    if out is not None and found.recipe is not None:
        atomic_write(Path(out), found.recipe.to_yaml().encode())
        say(f"The recipe is in {out}.")
    if keep and found.recipe is not None:
        say(kept.keep_for_budgets(found.recipe))
    return found


class Tuning:
    """One tuning from its first plain run to the stamp. say: is told each result, a line each. on_trial: is given each trial when
    it is done."""

    def __init__(self, pipe: Any, job: Job, folder: Path, say: Say, on_trial: Callable[[Trial], None] = lambda trial: None) -> None:
        self.pipe, self.job, self.say, self.on_trial = pipe, job, say, on_trial
        self.began = time.monotonic()
        known = fingerprint.known_by(denoisers(pipe))
        identity = known | {
            "model": job.model, "scheduler": type(pipe.scheduler).__name__,
            "call": {k: v for k, v in job.call.items() if isinstance(v, str | int | float | bool | type(None))},
            "prompts": [list(pair) for pair in job.prompts], "budget": str(job.goal),
        }  # fmt: skip
        self.study = Study(folder, job.goal, identity, job.seed)
        if self.study.others:
            say(f"{self.study.others} other process{'es are' if self.study.others > 1 else ' is'} at work on this study; its trials are shared.")
        self.recorders: list[Recorder] = []
        self.asked: dict[str, int] = {}
        self.held: list[Sample] = []

    def run(self) -> Tuned:
        """Search, then let held-out prompts decide."""
        trials, space, bench = self.searched(share=WITH_PEERS if self.job.peers else SEARCHING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Tuned(self.job.goal, trials, [], plain_seconds=bench.seconds, given_up=self.study.given_up())
            found.why += self._remarks(space)
            self._verify(found, bench)
        found.spent = max(self.used(), self.study.spent)  # a study may be older than this process
        return found

    def searched(self, goals: Sequence[Goal] = (), share: float = SEARCHING) -> tuple[list[Trial], Space, Bench]:
        """The trials, what was searched, and the tuning samples' bench, after `share` of the time. goals: searched for in one
        study, instead of the job's own."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a trial has to say is in its outcome
            tuning, self.held = self.job.samples(self.study.settled("samples", self._affordable()))
            self.say(f"Plain runs of {len(tuning)} tuning prompts; {len(self.held)} others are held out.")
            bench = Bench(self.pipe, self.job.call, tuning, self._recorded)
            fitting = Fitting.on(bench, lambda: share * self.job.seconds - self.used())
            if fitting is None:
                self.say(UNFITTED)
            space = self._space(fitting)
            self._measurable(bench)
            try:
                self.study.search(bench, space, share * self.job.seconds - self.used(), self._told, goals)
            finally:
                self.study.close()
            return self.study.trials(), space, bench

    def _affordable(self) -> int:
        """Samples of each kind for which the time is enough: plain runs take at most a sixth of it. Raises `UsageError` where
        it is not enough for the fewest."""
        sample = Sample(*self.job.prompts[0])
        shoot(self.pipe, sample, {**self.job.call, "num_inference_steps": 4})
        seconds = shoot(self.pipe, sample, {**self.job.call, "num_inference_steps": 8}).seconds * self.job.call["num_inference_steps"] / 8
        if self.job.seconds < (least := 8 * seconds):  # two samples of each kind, two runs of each
            raise UsageError(
                f"{self.job.seconds:.0f} s are too short: the plain runs alone take about {least:.0f} s. Allow {max(10, 5 * least):.0f} s or more."
            )
        return int(min(MOST, max(2, self.job.seconds / 6 / (3 * seconds))))

    def _measurable(self, bench: Bench) -> None:
        """Raises `UsageError` where the goal's measure cannot be had of this pipeline."""
        shot, measure = bench.plain[0], self.job.goal.measure
        if measure == "latent_error" and shot.latents is None:
            raise UsageError(f"{type(self.pipe).__name__} does not hand out its latents, so latent_error cannot be measured. Use psnr>=30.")
        if measure == "ssim" and min(shot.frames.shape[1:3]) < 11:
            raise UsageError("ssim needs frames of at least 11 x 11 pixels. Use psnr>=30.")

    @contextlib.contextmanager
    def _recorded(self, number: int) -> Iterator[None]:
        if number >= RECORDED:
            yield
            return
        guided = not self.recorders or self.recorders[0].guided
        with recording(self.pipe, guided) as recorder, hearing(self.pipe) as self.asked:
            yield
        self.recorders.append(recorder)

    def _space(self, fitting: Fitting | None) -> Space:
        signals: list[Signals] = [recorder.found for recorder in self.recorders if recorder.found is not None]
        alike = bool(signals) and all(each.times == signals[0].times and each.scale is not None for each in signals)
        alike = alike or (bool(signals) and all(each.times == signals[0].times and each.scale is None for each in signals))
        steps = self.recorders[0].steps if self.recorders else self.job.call["num_inference_steps"]
        presets = self.job.presets
        fit = None if fitting is None else fitting.fit
        return Space(
            steps, self.recorders[0].guided, signals if alike else (), self.job.attention, self.job.adapters, presets, fit,
            THINKING * self.job.seconds,
        )  # fmt: skip

    def _remarks(self, space: Space) -> list[str]:
        found = [] if space.fit is not None else [UNFITTED]
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
        result = measured.why or f"{measured.speedup:.2f}x, worst {goal.told(measured.worst(goal))}"
        self.say(f"{trial.number + 1}. {trial.recipe.name}: {result}")
        self.on_trial(trial)

    # --- at the end -------------------------------------------------------------------------------

    def _over(self) -> bool:
        return self.used() > VERIFYING * self.job.seconds

    def _verify(self, found: Tuned, tuning: Bench) -> None:
        goal = found.goal
        ready = finalists(found.trials, goal)
        if not ready:
            found.why.append(self._nothing(found))
            return
        self.say(f"{len(ready)} compositions keep {goal} on the tuning prompts; the fastest meet {len(self.held)} others.")
        held = Bench(self.pipe, self.job.call, self.held)
        found.verdicts = verified(held, ready, goal, self._over, self._verdict)
        found.best = fastest(found.verdicts, goal)
        found.control = self._control(held, ready, found.verdicts)
        found.noise_floor = noise_floor(held, held.samples[0])
        if found.best is None:
            found.best = found.control
        if found.best is None:
            found.why.append(
                f"{len(found.verdicts)} of the {len(ready)} compositions that kept {goal} on the tuning prompts were measured on"
                f" {len(self.held)} others, and none kept it. Allow more time, more prompts, or a lower budget."
            )
            return
        self._explained(found)
        found.recipe = stamped(found.best, goal, self._here(), self.job.model)
        if not self._over():
            few = Bench(self.pipe, self.job.call, tuning.samples[:2])
            found.interactions = interactions(few, found.best.trial.recipe, self._over)
        if self.job.peers:
            self._against_peers(found, held)

    def _control(self, held: Bench, ready: Sequence[Trial], verdicts: Sequence[Verdict]) -> Verdict | None:
        """The fastest fewer-steps run that keeps the goal on held-out samples; None where none did."""
        goal, steps = self.job.goal, [trial for trial in ready if is_control(trial)][:3]
        known = {verdict.trial.number: verdict for verdict in verdicts}
        for trial in steps:
            verdict = known.get(trial.number) or verified(held, [trial], goal, self._over, self._verdict)[0]
            if verdict.holds(goal):
                return verdict
            if self._over():
                break
        return None

    def _nothing(self, found: Tuned) -> str:
        """Why there is no finalist, and what to do."""
        if not found.trials and not found.given_up:
            return f"The time was over before any composition had run: a plain run takes {found.plain_seconds:.2g} s. Allow more time."
        ran = f"None of the {len(found.trials) + len(found.given_up)} compositions that were tried keeps {found.goal} on every tuning prompt"
        best = max(found.trials, key=lambda trial: found.goal.better(trial.measured.worst(found.goal)), default=None)
        near = f"; the nearest was {best.recipe.name} (worst {found.goal.told(best.measured.worst(found.goal))})" if best is not None else ""
        often = collections.Counter(why for _, why in found.given_up).most_common(1)
        reason = f"; what was given up most often: {often[0][0]}" if often and best is None else ""
        return f"{ran}{near}{reason}. Allow more time, or a lower budget."

    def _explained(self, found: Tuned) -> None:
        """What the reader has to know of the best composition."""
        assert found.best is not None
        control, best = found.control, found.best
        if control is not None and control.measured.speedup > best.measured.speedup:
            found.best = best = control
        if is_control(best.trial):
            found.why.append("Fewer steps with a better solver won: no composition was faster within the budget.")
        if len(self.held) < FEW:
            found.why.append(
                f"{len(self.held)} held-out prompt{'s show' if len(self.held) > 1 else ' shows'} little; {3 * FEW} prompts or more give an interval."
            )

    def _against_peers(self, found: Tuned, held: Bench) -> None:
        """The caches of diffusers and cache-dit on the held-out samples, while there is time."""
        found.peers, unmeasured = against(held, in_turn(sweep(self.pipe, self.job.call, THIN)), found.goal, self._over, self.say)
        assert found.best is not None
        kept = [peer for peer in found.peers if peer.whole and peer.kept(found.goal) >= NEEDED]
        best = max(kept, key=lambda peer: peer.speedup, default=None)
        if best is not None and best.speedup > found.best.measured.speedup:
            found.why.append(
                f"{best.name} is faster than the tuned recipe and keeps the budget: {best.speedup:.2f}x. It is not hasten's, so it is not in the recipe."
            )
        if unmeasured:
            found.why.append(f"{unmeasured} settings of peers were not measured: the time was over.")

    def _verdict(self, verdict: Verdict) -> None:
        measured, goal = verdict.measured, self.job.goal
        result = f"{measured.speedup:.2f}x, {measured.kept(goal):.0%} keep {goal}, worst {goal.told(measured.worst(goal))}"
        self.say(f"Held out: {measured.name}: {measured.why or result}")

    def _here(self) -> dict[str, Any]:
        first = self.recorders[0]
        return fingerprint.known_by(denoisers(self.pipe)) | {
            "scheduler": type(self.pipe.scheduler).__name__, "steps": first.steps, "shape": first.shape,
            "asked": tuple(self.asked.items()),
        }  # fmt: skip
