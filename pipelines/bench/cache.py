"""One table per model for caches: every preset, every peer at every setting, both controls and the oracle.

Same process, same weights, and per sample the same noise. A candidate is first probed on one sample, untimed: what it
computes and holds is counted, and whether it crashes, refuses or leaves the pipeline changed shows. Those that can
run then take turns on every sample, next to plain runs of the same sample, so that speed-ups are ratios of
neighbours. `bars` says what the table answers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hasten import metrics
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Listed
from hasten.errors import RefusedError
from hasten.forecast import Polynomial
from hasten.pipelines.bench.bars import SETTING, oracle_name
from hasten.pipelines.bench.candidates import Candidate, fewer_steps, ours
from hasten.pipelines.bench.foreign import because
from hasten.pipelines.bench.oracle import Recording, as_rule, record, search
from hasten.pipelines.bench.parts import in_parts
from hasten.pipelines.bench.shots import Column, Sample, Shot, other_seed, row_of, shoot
from hasten.pipelines.recipes import names
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.work import Work, watch
from hasten.recipe import Recipe

Tell = Callable[[str], None]
Row = dict[str, Any]

SOLVERS = ("euler", "unipc", "dpm++")
SHARES = (0.1, 0.14, 0.18, 0.24, 0.32, 0.45, 0.65)
"""Shares of the plain run's steps that the fewer-steps control is measured at."""

TOLERANCES = tuple(f"psnr={psnr}" for psnr in (15, 20, 25, 30, 35, 40, 45)) + tuple(
    f"latent_error={error}" for error in (0.01, 0.02, 0.05, 0.1)
)

NEIGHBOURS = 30
"""Timed runs after which the plain run is timed again."""

ORACLE = NetworkReuse(rule=Listed(at=(0.0,)), forecast=Polynomial(order=1, damp=0.75), correct=2)
"""The policy whose best schedule is searched on a recorded run, and then really run."""


@dataclass(slots=True)
class Bench:
    """rows: with the keys of the design. outcomes: recipe -> one entry per sample (psnr is None where identical)."""

    rows: list[Row] = field(default_factory=list)
    outcomes: dict[str, list[dict[str, float | None]]] = field(default_factory=dict)


def preset(text: str) -> tuple[str, Recipe]:
    """The label and the recipe of a name, with arguments or without: ("auto @ psnr=35", recipe) of "auto:psnr=35".

    The label is what makes settings of one recipe a family. Raises `RecipeError` for an unknown name or argument.
    """
    name, colon, settings = text.partition(":")
    return (f"{name}{SETTING}{settings.replace(',', ', ')}" if colon else name), find_recipe(text)


def all_presets() -> list[str]:
    """Every recipe but those of attention and students at its defaults, `fast` as it is without a student, and `auto` over the
    tolerances that the bars ask about. A student draws other pictures, so that likeness to the plain run says nothing of it."""
    found = {name: find_recipe(name) for name in names()}
    caches = [name for name, recipe in found.items() if recipe.attention is None and recipe.adapter is None]
    return [name for name in caches if name not in ("plain", "auto")] + [
        "fast:student=false", *(f"auto:{tolerance}" for tolerance in TOLERANCES)
    ]


def bench_cache(
    pipe: Any,
    call: dict[str, Any],
    samples: Sequence[Sample],
    presets: Mapping[str, Recipe],
    *,
    model: str = "",
    peers: Sequence[Candidate] = (),
    oracle_of: str = "auto",
    thin: int = 1,
    jobs: int = 1,
    tell: Tell = lambda _: None,
) -> Bench:
    """Measure `presets` on `samples` against the plain run, fewer steps, the oracle and `peers` (`peers.sweep`).

    oracle_of: the family whose settings get an oracle row each; "" for none. thin: only every so many step numbers of the
    fewer-steps controls. jobs: forks that share the samples; all
    runs of one sample stay in one of them. Only on the CPU, and only where PyTorch runs on one thread.

    computed_fraction is the share of denoiser work: as reported for ours (median over the samples), the share of steps
    for fewer steps, counted in floating point operations on the first sample for peers. bytes_held likewise: reported for ours, for peers
    by how much more than in the plain run the living tensors grow until the denoiser last returns. Candidates that
    cannot run are rows with `n` 0 and the reason in `note`.
    Raises `RefusedError` when a peer leaves the pipeline changed: no later row would mean anything; `UsageError` when
    jobs are asked for where forks are not safe.
    """
    run = Run(pipe, call, samples, tell)
    mine = [ours(name, recipe) for name, recipe in presets.items()]
    for candidate in (*mine, *controls(call["num_inference_steps"], thin), *peers):
        run.probe(candidate)
    oracles = in_parts(run, oracle_of, jobs)
    columns = [column for column in run.columns if not column.candidate.control]
    bench = Bench([row_of(model, run.plain, run.plain, samples), other_seed(model, run.plain, samples)])
    for column in [*columns, *oracles, *(column for column in run.columns if column.candidate.control)]:
        bench.rows.append(_noted(row_of(model, column, run.plain, samples), column))
        bench.outcomes[column.candidate.recipe] = [
            outcome(p, s, seconds)
            for p, s, seconds in zip(run.plain.shots, column.shots, column.plain_seconds, strict=True)
        ]
    bench.rows += [
        {
            "model": model,
            "recipe": candidate.recipe,
            "control": candidate.control or None,
            "n": 0,
            "note": reason,
        }
        for candidate, reason in run.failed
    ]
    return bench


def controls(steps: int, thin: int = 1) -> list[Candidate]:
    """Fewer steps with each solver, at `SHARES` of the plain number (every `thin`-th)."""
    numbers = sorted({min(steps, max(2, round(steps * share))) for share in SHARES[thin - 1 :: thin]})
    return [fewer_steps(solver, number) for solver in SOLVERS for number in numbers]


def outcome(plain: Shot, shot: Shot, plain_seconds: float) -> dict[str, float | None]:
    """One run beside the plain run of its sample, in as many digits as mean something: there are thousands of them."""
    psnr = metrics.psnr(plain.frames, shot.frames)
    known = plain.latents is not None and shot.latents is not None
    return {
        "speedup": round(plain_seconds / shot.seconds, 3),
        "psnr": round(psnr, 3) if math.isfinite(psnr) else None,
        "latent_error": round(metrics.latent_error(shot.latents, plain.latents), 6) if known else None,
        "nfe": shot.nfe,
    }


def _noted(row: Row, column: Column) -> Row:
    """The row with what its reader must know: inert methods, and ours that fell back."""
    warnings = list(column.shots[0].warnings) if column.candidate.control != "oracle" else []
    if row.get("exact_match") and not column.candidate.control.startswith("oracle"):
        warnings.insert(0, "inert: the output is identical to the plain run")
    return row | {"note": " ".join(warnings)} if warnings else row


class Run:
    """The phases of one benchmark, and what they found so far."""

    def __init__(self, pipe: Any, call: dict[str, Any], samples: Sequence[Sample], tell: Tell) -> None:
        self.pipe, self.call, self.samples, self.tell = pipe, call, samples, tell
        self.steps: int = call["num_inference_steps"]
        self.plain = Column(ours("plain", "plain"))
        self.columns: list[Column] = []
        self.failed: list[tuple[Candidate, str]] = []
        self.number, self.total = 0, len(samples)
        self._work: dict[str, Work] = {}
        self.best: dict[tuple[int, int], Shot] = {}
        tell("warm-up")
        with watch(pipe) as first:
            shoot(pipe, samples[0], call)
        with watch(pipe, weigh_at=first.calls) as self.reference:
            report = shoot(pipe, samples[0], call, self.plain.candidate)
        self.plain.nfe = round(report.nfe or 0)
        self._short = {**call, "num_inference_steps": 2}
        self._before = shoot(pipe, samples[0], self._short).frames

    @property
    def branches(self) -> int:
        return max(1, round(self.plain.nfe / self.steps))

    def probe(self, candidate: Candidate) -> None:
        """Run a candidate once, untimed: it gets a column, or a reason why not."""
        self.tell(f"probing {candidate.recipe}")
        try:
            foreign = candidate.control.startswith("peer:")  # others know what they compute; counting is slow
            with (
                watch(self.pipe, weigh_at=self.reference.calls)
                if foreign
                else contextlib.nullcontext() as work
            ):
                self._shoot(self.samples[0], candidate)
        except Exception as error:  # noqa: BLE001 - whatever it raises is the reason in the table
            self.failed.append((candidate, because(error)))
        else:
            if work is not None:
                self._work[candidate.recipe] = work
            self.columns.append(Column(candidate))
        if candidate.control.startswith("peer:") and not self._unchanged():
            raise RefusedError(
                f"{candidate.recipe} left the pipeline changed: a plain run after it differs from one before."
                " Load the model again and leave this peer out (--no-peers)."
            )

    def _unchanged(self) -> bool:
        return np.array_equal(shoot(self.pipe, self.samples[0], self._short).frames, self._before)

    def _shoot(self, sample: Sample, candidate: Candidate | None = None) -> Shot:
        shot = shoot(self.pipe, sample, self.call, candidate)
        if not np.isfinite(shot.frames).all():
            raise RefusedError("the output is not finite.")
        shot.frames = shot.frames.astype(np.float32)  # what pipelines return; half the memory
        work = self._work.get(candidate.recipe) if candidate is not None else None
        if candidate is not None and candidate.steps is not None:
            shot.computed_fraction = candidate.steps / self.steps
        elif work is not None and shot.computed_fraction is None:
            shot.computed_fraction = work.flops / self.reference.flops
            if work.growth is not None and self.reference.growth is not None:
                shot.bytes_held = max(0, work.growth - self.reference.growth)
        return shot

    def measure(self) -> None:
        """Every column on every sample; a column that fails on the way loses its shots."""
        for sample in self.samples:
            self.tell(f"sample {self.number + 1} of {self.total}: {sample.prompt}, seed {sample.seed}")
            self.plain.shots.append(self._shoot(sample))
            self.plain.plain_seconds.append(self.plain.shots[-1].seconds)
            seconds = self.plain.shots[-1].seconds
            for position, column in enumerate(list(self.columns), 1):
                try:
                    column.shots.append(self._shoot(sample, column.candidate))
                except Exception as error:  # noqa: BLE001 - as in probe
                    self.columns.remove(column)
                    self.failed.append(
                        (column.candidate, f"on {sample.prompt!r}, seed {sample.seed}: {because(error)}")
                    )
                else:
                    column.plain_seconds.append(seconds)
                if position % NEIGHBOURS == 0:
                    seconds = self._shoot(sample).seconds

    def oracles(self, family: str) -> list[Column]:
        """For each setting of `family` that skips evaluations: per sample the best schedule with as many computed steps."""
        mine = [c for c in self.columns if not c.candidate.control and c.candidate.recipe.partition(SETTING)[0] == family]
        skipping = [c for c in mine if all(s.nfe is not None and s.nfe < self.plain.nfe for s in c.shots)]
        with contextlib.suppress(StopIteration):
            recordings = [next(self._recorded(sample)) for sample in self.samples] if skipping else []
            return [self._oracle(column, recordings) for column in skipping]
        return []

    def _recorded(self, sample: Sample) -> Iterator[Recording]:
        """The recording of one plain run; none where the solver is not first-order."""
        try:
            with record(self.pipe.scheduler) as found:
                shoot(self.pipe, sample, self.call)
        except RefusedError as error:
            self.tell(f"no oracle: {error}")
            return
        yield from found

    def _oracle(self, column: Column, recordings: Sequence[Recording]) -> Column:
        self.tell(f"oracle of {column.candidate.recipe}")
        name = oracle_name(column.candidate.recipe)
        found = Column(Candidate(name, column.candidate.apply, "oracle"))
        for index, shot in enumerate(column.shots):
            assert shot.nfe is not None
            computed = max(1, round(shot.nfe / self.branches))
            if (index, computed) not in self.best:
                self.best[index, computed] = self._searched(index, recordings[index], computed)
            best = max((self.best[index, computed], shot), key=lambda s: self._psnr(index, s))
            found.shots.append(best)
            found.plain_seconds.append(self.plain.shots[index].seconds)
        return found

    def _searched(self, index: int, recording: Recording, computed: int) -> Shot:
        rule = as_rule(search(ORACLE, [recording], computed, starts=1, rounds=2), len(recording.times))
        recipe = Recipe(name="oracle", reuse=ORACLE.model_copy(update={"rule": rule}))
        return self._shoot(self.samples[index], ours("oracle", recipe))

    def _psnr(self, index: int, shot: Shot) -> float:
        return metrics.psnr(self.plain.shots[index].frames, shot.frames)
