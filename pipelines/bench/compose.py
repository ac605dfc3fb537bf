"""Compositions against single methods: what minutes of tuning find, beside every preset, every peer and fewer steps.

One process, one set of weights, and per sample the same noise. Prompts are those of the distillation bench, which name what
they ask for; every third is held out, and only held-out ones are in the table. A candidate counts at a PSNR if at least
`verify.NEEDED` of the held-out samples reach it, ours and others' alike; it is given up once that cannot be had any more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten import metrics
from hasten.pipelines.bench.bars import PSNRS, Bar
from hasten.pipelines.bench.cache import all_presets, controls, preset
from hasten.pipelines.bench.candidates import Candidate, ours
from hasten.pipelines.bench.finish import photo_finish
from hasten.pipelines.bench.foreign import because
from hasten.pipelines.bench.peers import sweep
from hasten.pipelines.bench.shots import Sample, shoot
from hasten.pipelines.recipes import acts_on
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.job import Job
from hasten.pipelines.tune.result import Tuned
from hasten.pipelines.tune.run import Tuning
from hasten.pipelines.tune.study import Trial
from hasten.pipelines.tune.trials import Bench, Measured, Outcome
from hasten.pipelines.tune.verify import NEEDED, close, finalists, promising

FASTER = 1.3
"""What a tuned composition should be faster by than the best of the others."""

NEIGHBOURS = 4
"""Candidates after which the plain run is timed again."""

FINISHERS = 3
"""Of every kind, so many of the fastest that keep a PSNR are timed in turn at the end."""

KINDS = ("tuned", "preset", "peer", "fewer steps")

SLOW, LOOKS = 1.5, 3
"""What is slower than this after so many samples is spared the others: no bar asks for it."""

TRIED = 8
"""Tuned compositions that are measured on held-out samples for each PSNR."""

Tell = Callable[[str], None]


@dataclass(slots=True)
class Entry:
    """One candidate on the held-out samples. what: "tuned", "preset", "peer" or "fewer steps". recipe: as YAML, of tuned ones;
    trial: their number. converged: PSNR to the converged solution, median over the samples for which one was made. timed: its
    speed-up in the photo finish, of those that were in it."""

    what: str
    measured: Measured
    recipe: str = ""
    trial: int | None = None
    converged: float | None = None
    candidate: Candidate | None = None
    timed: float | None = None

    @property
    def speedup(self) -> float:
        return self.measured.speedup if self.timed is None else self.timed

    def keeps(self, psnr: float) -> bool:
        return self.measured.whole and self.measured.kept(Goal("psnr", psnr)) >= NEEDED


@dataclass(slots=True)
class Contest:
    """All entries, and what tuning said of itself."""

    entries: list[Entry] = field(default_factory=list)
    chosen: dict[float, str] = field(default_factory=dict)
    tuned: Tuned | None = None
    floor: float | None = None
    plain_converged: float | None = None

    def kept(self, what: str, psnr: float) -> list[Entry]:
        """Those of a kind that keep a PSNR, the fastest first; those of the photo finish before all others, whose clock was another
        one."""
        found = [entry for entry in self.entries if entry.what == what and entry.keeps(psnr)]
        return sorted(found, key=lambda entry: (entry.timed is None, -entry.speedup))

    def best(self, what: str, psnr: float) -> Entry | None:
        """The fastest of a kind that keeps a PSNR."""
        return next(iter(self.kept(what, psnr)), None)


def bench_compose(
    pipe: Any, call: dict[str, Any], prompts: Sequence[str], *, model: str, seconds: float, folder: Path, held: int = 12,
    converged: int = 200, thin: int = 1, tell: Tell = lambda _: None,
) -> Contest:  # fmt: skip
    """Tune for `seconds` (one study for all of `PSNRS`), then measure what it found and everybody else on held-out prompts."""
    job = Job(Goal("psnr", min(PSNRS)), tuple((text, 100 + k) for k, text in enumerate(prompts)), call, seconds, model)
    tuning = Tuning(pipe, job, folder, tell)
    found = Contest()
    trials, space, _ = tuning.searched([Goal("psnr", psnr) for psnr in PSNRS], share=1.0)
    found.tuned = Tuned(job.goal, trials, [], spent=max(tuning.used(), tuning.study.spent))  # a study may be older than this process
    samples = job.samples(held)[1][:held]
    bench = Bench(pipe, call, samples)
    bench.retimed = NEIGHBOURS
    exact = _converged(bench, converged, tell)
    found.floor = _floor(bench)
    found.plain_converged = statistics.median(metrics.psnr(plain.frames, frames) for plain, frames in zip(bench.plain, exact, strict=False))
    for psnr in PSNRS:
        _tuned(found, bench, trials, psnr, exact, tell)
    for candidate, what in _others(pipe, call, space.steps, thin):
        entry = measured(bench, candidate, what, exact)
        tell(f"{what}: {candidate.recipe}: {entry.measured.why or f'{entry.measured.speedup:.2f}x'}")
        found.entries.append(entry)
    _finish(found, bench, tell)
    return found


def _finish(found: Contest, bench: Bench, tell: Tell) -> None:
    """Time the fastest of every kind once more, in turn, and choose by that."""
    near: dict[int, Entry] = {}
    for psnr in PSNRS:
        for what in KINDS:
            near |= {id(entry): entry for entry in found.kept(what, psnr)[:FINISHERS] if entry.candidate is not None}
    for entry, timed in zip(near.values(), photo_finish(bench, [e.candidate for e in near.values() if e.candidate]), strict=True):
        tell(f"photo finish: {entry.measured.name}: {timed:.2f}x")
        entry.timed = timed
    for psnr in PSNRS:
        best = found.best("tuned", psnr)
        if best is not None:
            found.chosen[psnr] = best.measured.name


def _tuned(found: Contest, bench: Bench, trials: Sequence[Trial], psnr: float, exact: Sequence[Any], tell: Tell) -> None:
    """The fastest compositions that keep a PSNR on the tuning prompts, until one does on held-out ones; then those that are `close`
    to it. The photo finish chooses."""
    goal, failed, holding = Goal("psnr", psnr), list[Trial](), list[Trial]()
    for trial in finalists(trials, goal):
        if len(failed) >= TRIED:
            break
        if not promising(trial, failed, goal) or not all(close(trial, other) for other in holding):
            continue
        known = next((entry for entry in found.entries if entry.trial == trial.number), None)
        entry = known or measured(bench, ours(trial.recipe.name, trial.recipe), "tuned", exact, trial.recipe.to_yaml())
        if known is None:
            entry.trial = trial.number
            found.entries.append(entry)
        tell(f"tuned for {psnr:g} dB: {trial.recipe.name}: {entry.measured.why or f'{entry.measured.speedup:.2f}x'}")
        (holding if entry.keeps(psnr) else failed).append(trial)


def _others(pipe: Any, call: dict[str, Any], steps: int, thin: int) -> list[tuple[Candidate, str]]:
    known = map(preset, all_presets())
    found = [(ours(label, recipe), "preset") for label, recipe in known if acts_on(recipe) in ("diffusion models", "any model")]
    found += [(candidate, "fewer steps") for candidate in controls(steps, 1)]
    return found + [(candidate, "peer") for candidate in sweep(pipe, call, thin)]


def measured(bench: Bench, candidate: Candidate, what: str, exact: Sequence[Any], recipe: str = "") -> Entry:
    """A candidate on the held-out samples, until it cannot keep the lowest PSNR any more, or is too slow to be of interest."""
    goal = Goal("psnr", min(PSNRS))
    allowed = math.floor((1 - NEEDED) * len(bench.samples) + 1e-9)

    def hopeless(outcomes: Sequence[Outcome]) -> str:
        if sum(not goal.met(outcome.value(goal)) for outcome in outcomes) > allowed:
            return f"fewer than {NEEDED:.0%} can keep {goal.limit:g} dB"
        speedup = statistics.median(outcome.speedup for outcome in outcomes)
        return f"{speedup:.2f}x, slower than {SLOW}x" if len(outcomes) >= LOOKS and speedup < SLOW else ""

    found = bench.measure(candidate.recipe, candidate, until=hopeless)
    entry = Entry(what, found, recipe, candidate=candidate)
    if found.whole:
        distances = []
        for sample, frames in zip(bench.samples, exact, strict=False):
            try:
                distances.append(metrics.psnr(frames, shoot(bench.pipe, sample, bench.call, candidate).frames))
            except Exception as error:  # noqa: BLE001 - it ran a moment ago; whatever it says now belongs into the table
                entry.measured = Measured(found.name, found.outcomes, because(error))
        entry.converged = statistics.median(distances) if distances else None
    return entry


def _converged(bench: Bench, steps: int, tell: Tell) -> list[Any]:
    """Frames of runs with many steps, of the first three samples."""
    tell(f"converged runs of {steps} steps")
    call = {**bench.call, "num_inference_steps": steps}
    return [shoot(bench.pipe, sample, call).frames for sample in bench.samples[:3]]


def _floor(bench: Bench) -> float:
    """Median PSNR between two seeds of one prompt."""
    others = [shoot(bench.pipe, Sample(s.prompt, s.seed + 7919), bench.call) for s in bench.samples[:4]]
    return statistics.median(metrics.psnr(plain.frames, other.frames) for plain, other in zip(bench.plain, others, strict=False))


def bars(found: Contest) -> list[Bar]:
    """At each PSNR: how much faster the tuned composition is than the best of all others; and whether it kept its budget."""
    verdicts = []
    for psnr in PSNRS:
        question = f"{FASTER}x faster than the best single method at {psnr:g} dB"
        mine = next((e for e in found.entries if e.what == "tuned" and e.measured.name == found.chosen.get(psnr)), None)
        rivals = {what: found.best(what, psnr) for what in KINDS[1:]}
        told = ", ".join(f"best {w}: {e.measured.name} {e.speedup:.2f}x" for w, e in rivals.items() if e is not None)
        best = max((e.speedup for e in rivals.values() if e is not None), default=None)
        if mine is None or best is None:
            verdicts.append(Bar(question, False if mine is None else None, told or "nobody keeps it on the held-out prompts"))
            continue
        ratio = mine.speedup / best
        verdicts.append(Bar(question, ratio >= FASTER, f"ratio {ratio:.2f}: tuned ({mine.measured.name}) {mine.speedup:.2f}x; {told}"))
        kept = mine.measured.kept(Goal("psnr", psnr))
        verdicts.append(Bar(f"{psnr:g} dB kept on {NEEDED:.0%} of the held-out prompts", kept >= NEEDED, f"{kept:.0%} of {len(mine.measured.outcomes)}"))
    return verdicts


def rows(found: Contest, model: str) -> list[Mapping[str, Any]]:
    """One row per candidate, with the keys of the design."""
    made: list[Mapping[str, Any]] = []
    table = found.tuned or Tuned(Goal("psnr", min(PSNRS)), [], [])
    control = {"tuned": None, "preset": None, "fewer steps": "fewer_steps"}
    for entry in found.entries:
        row = {"model": model, "what": entry.what} | table.row(entry.measured)
        row["control"] = control.get(entry.what, f"peer:{entry.measured.name.partition(' ')[0]}")
        row["psnr_converged"] = entry.converged
        if entry.timed is not None:
            row["speedup"], row["timed"] = entry.timed, "in turn"
        row["keeps"] = [psnr for psnr in PSNRS if entry.keeps(psnr)]
        row["tuned_for"] = [psnr for psnr, name in found.chosen.items() if entry.what == "tuned" and name == entry.measured.name]
        made.append(row)
    return made
