"""The fastest lossless way of decoding a causal language model on this machine: which drafter, how many drafts, which pace.

Nothing is lost by any candidate, so only time is searched, and no quality has to be weighed: every drafter with its own
number of drafts first, then other numbers and paces for the best of them, then held-out prompts for the two fastest. Plain
`generate` runs directly before each, batch by batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.atomic import atomic_write
from hasten.errors import HastenError, UsageError
from hasten.pipelines.bench.decode import Bench, Cell
from hasten.pipelines.bench.decode_texts import Workload
from hasten.pipelines.bench.decode_ways import every
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.tune.decode_result import DecodeTuned, DecodeVerdict, stamped
from hasten.pipelines.tune.kept import keep_for_budgets
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Average, Goodput, Steady

SIZES = (4, 8, 12, 16, 24, 32)
"""Drafts of a round that are tried for the best drafters."""

FINALISTS = 3
SAVES = 1.02
"""Speed-up that is worth a recipe."""

LEAST = 4
"""Prompts: half of them are held out."""

SEARCHED = 0.75
"""Share of the time after which nothing new is tried; held-out prompts have the rest."""


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """What is tuned. prompts: token ids; every second is held out. batch: texts at once; new: tokens to write; sampled: are
    tokens drawn, or the most probable ones taken? seconds: for everything. recipes: names or recipes with drafts that are
    tried besides those of `hasten recipes`."""

    prompts: Sequence[list[int]]
    seconds: float
    batch: int = 1
    new: int = 64
    sampled: bool = False
    recipes: Sequence[str | Path | Recipe] = ()
    repeats: int = 3

    def __post_init__(self) -> None:
        if len({tuple(row) for row in self.prompts}) < LEAST:
            raise UsageError(f"Tuning needs at least {LEAST} different prompts, of which every second is held out, got {len(self.prompts)}.")
        for each in self.recipes:
            if (found := find_recipe(each)).draft is None or not getattr(found.verify, "lossless", True):
                raise UsageError(f"{found.name or each} is no lossless recipe with drafts. Name one, such as look-up.")

    def cells(self) -> tuple[Cell, Cell]:
        """(tuning prompts, held-out ones)."""
        tuning, held = (Workload(name, list(self.prompts[begin::2])) for begin, name in enumerate(("tuning", "held out")))
        return Cell(tuning, self.batch, self.sampled), Cell(held, self.batch, self.sampled)


def tune_decode(
    model: Any, tokenizer: Any, job: DecodeJob, *, name: str = "", out: Path | None = None, keep: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> DecodeTuned:  # fmt: skip
    """Search; writes the recipe with its stamp to `out` and, with `keep`, where `hasten.Budget(lossless=True)` finds it.

    model: a causal language model of transformers, restored afterwards. name: what the stamp calls it. `recipe` of the result
    is None where plain decoding is the fastest.
    """
    search = _Search(Bench(model, tokenizer, name, job.new, job.repeats), job, time.monotonic() + SEARCHED * job.seconds, say)
    found = search.run()
    if found.best is not None:
        found.recipe = stamped(found, found.best, model, tokenizer, name)
        if out is not None:
            atomic_write(out, found.recipe.to_yaml())
        if keep:
            found.why.append(keep_for_budgets(found.recipe))
    found.spent = time.monotonic() - search.began
    return found


class _Search:
    """The search of one job. Trials are kept by recipe, so that nothing is measured twice."""

    def __init__(self, bench: Bench, job: DecodeJob, until: float, say: Callable[[str], None]) -> None:
        self.bench, self.job, self.until, self.say = bench, job, until, say
        self.began = time.monotonic()
        self.spent: list[float] = []
        self.tuning, self.held = job.cells()
        clock = "speedup" if bench.model.device.type == "cuda" else "speedup_processor"
        self.found = DecodeTuned(clock, job.batch, job.new, job.sampled)

    def run(self) -> DecodeTuned:
        tuning, held = (len(cell.workload.prompts) for cell in (self.tuning, self.held))
        self.say(f"{tuning} prompts to tune on, {held} held out; {self.job.new} tokens each, in batches of {self.job.batch}")
        self._drafters()
        if not self.found.trials and not self.over:
            raise UsageError("No lossless drafter runs on this model: " + "; ".join(f"{name}: {why}" for name, why in self.found.given_up))
        self._sizes()
        self._paces()
        self._verify()
        if self.over:
            self.found.why.append(f"The time was over after {len(self.found.trials)} trials; give more for a wider search.")
        return self.found

    @property
    def over(self) -> bool:
        """Is there no time for another trial as long as the last ones?"""
        return time.monotonic() + (statistics.median(self.spent[-3:]) if self.spent else 0.0) > self.until

    def _drafters(self) -> None:
        """Each drafter as it comes, with goodput."""
        named = [(str(each), find_recipe(each)) for each in self.job.recipes]
        for name, found in (*named, *((way.name, way.recipe) for way in every())):
            self._try(found.name or name, found.model_copy(update={"pace": Goodput()}))

    def _sizes(self) -> None:
        """Other numbers of drafts, for the fastest drafters."""
        for trial in self.found.fastest(FINALISTS):
            for nodes in SIZES:
                self._vary(trial, {"draft.nodes": nodes}, f"nodes={nodes}")

    def _paces(self) -> None:
        """Other paces, for the fastest of all. One that always drafts has to be clearly faster: at other batch sizes, and on
        other prompts, it may be slower than plain decoding, which goodput is not."""
        for trial in self.found.fastest(2):
            for pace in (Average(), Steady()):
                self._vary(trial, {"pace": pace.model_dump()}, pace.kind)

    def _vary(self, trial: DecodeVerdict, change: dict[str, Any], words: str) -> None:
        try:
            self._try(f"{trial.name}, {words}", trial.recipe.replace(change))
        except HastenError as error:  # fields that belong together: this number is none for this drafter
            self.found.given_up.append((f"{trial.name}, {words}", str(error)))

    def _try(self, name: str, recipe: Recipe) -> None:
        parts = recipe.axes
        if self.over or any(trial.recipe.axes == parts for trial in self.found.trials):
            return
        began = time.monotonic()
        row = self.bench.row(self.tuning, name, recipe)
        if "speedup" in row:  # what is refused takes no time
            self.spent.append(time.monotonic() - began)
        else:
            self.found.given_up.append((name, str(row["note"])))
            return
        self.found.trials.append(DecodeVerdict(name, recipe, row))
        self.say(f"{name}: {row[self.found.clock]:.2f}x, {row['tokens_per_forward']:.2f} tokens per forward")

    def _verify(self) -> None:
        """The first of the fastest that saves time on held-out prompts, too."""
        for trial in self.found.fastest(FINALISTS):
            if trial.speed(self.found.clock) < SAVES:
                break
            row = self.bench.row(self.held, trial.name, trial.recipe)
            verdict = DecodeVerdict(trial.name, trial.recipe, row)
            self.found.verdicts.append(verdict)
            if verdict.speed(self.found.clock) >= SAVES and row.get("exact_match") in (None, 1.0):
                self.found.best = verdict
                return
