"""`hasten profile`: a few full runs of a model, and the recipes that their measurements give."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from hasten.drift import Drift
from hasten.errors import RefusedError
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.generate import Request, generate
from hasten.pipelines.recipes import blocks as recipes
from hasten.pipelines.seams.profile import ProfileSeam
from hasten.recipe import Recipe
from hasten.step import Step

MIN_POINTS = 5
"""Fewer pairs than this per coefficient, and the polynomial gets a lower degree."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What the blocks of the denoisers did, over `runs` runs of `steps` evaluations each.

    Where two networks share the run (Wan 2.2: one at high noise, one at low), all numbers are of both, so that the recipes
    hold for both. served: network -> the first and the last step (indices) that were measured on it. change: per block, the median relative L1 change of what it adds from one step to the next. foreground: per block, attention
    on salient tokens over their share, or why it was not measured. ratios: per step, |R_t| / |R_(t-1)| of all blocks
    together, the first 1. pairs: (change of the first block's input, change of the output) of every step of every
    run, run after run. lists: name and blocks of each block list.
    """

    lists: dict[str, int]
    served: dict[str, tuple[int, int]]
    steps: int
    runs: int
    change: list[float]
    foreground: list[float] | str
    ratios: list[float]
    pairs: list[tuple[float, float]]

    def still(self, share: float) -> tuple[int, ...]:
        """The `share` of the blocks that is best left out, ascending: those that move least from step to step.

        Where attention was measured a block's movement counts by how much it looks at salient tokens, so that of two
        that move alike the one that works on the background is left out first (ProfilingDiT, arXiv 2504.03140, leaves
        out the blocks that attend to the background; how it weighs the two measurements is our own choice).
        """
        lift = self.foreground if isinstance(self.foreground, list) else [1.0] * len(self.change)
        score = [change * weight for change, weight in zip(self.change, lift, strict=True)]
        num = min(len(score), max(1, round(share * len(score))))
        return tuple(sorted(sorted(range(len(score)), key=score.__getitem__)[:num]))

    def polynomial(self) -> tuple[tuple[float, ...], tuple[float, float], float]:
        """Coefficients (highest first) that turn the input's change into the output's, their domain, and R squared.

        Least squares of degree 4 (TeaCache, arXiv 2411.19108), lower where there are few pairs.
        """
        x, y = (numpy.array(column, dtype=float) for column in zip(*self.pairs, strict=True))
        degree = min(4, max(1, len(x) // MIN_POINTS - 1), len(numpy.unique(x)) - 1)
        found = numpy.polyfit(x, y, max(0, degree))
        spread = float(((y - y.mean()) ** 2).sum())
        rest = float(((y - numpy.polyval(found, x)) ** 2).sum())
        fit = 1.0 - rest / spread if spread > 0 else 1.0
        return tuple(float(c) for c in found), (float(x.min()), float(x.max())), fit

    def limit(self, computed: float) -> float:
        """The least limit of `Drift` with which the profiled runs compute at most the share `computed` of their steps."""
        coefficients, _, _ = self.polynomial()
        per_run = len(self.pairs) // self.runs
        changes = [max(0.0, float(numpy.polyval(coefficients, x))) for x, _ in self.pairs]
        low, high = 0.0, sum(changes) + 1.0
        for _ in range(40):
            middle = (low + high) / 2
            rule = Drift(limit=middle, accumulate=True, warmup=0.02)
            counts = [_computed(rule, changes[i : i + per_run]) for i in range(0, len(changes), per_run)]
            low, high = (low, middle) if statistics.mean(counts) <= computed else (middle, high)
        return high

    def recipes(self, *, share: float = 0.5, computed: float = 0.5, interval: int = 3) -> dict[str, Recipe]:
        """Recipes made of these measurements, by the name of their paper.

        share: part of the blocks that ProfilingDiT leaves out. computed: share of steps that TeaCache is to compute;
        its limit follows. interval: ProfilingDiT computes all blocks at one step in so many.
        """
        coefficients, domain, _ = self.polynomial()
        rounded = tuple(float(f"{c:.8g}") for c in coefficients)
        made = {
            "profiling-dit": recipes.profiling_dit(blocks=self.still(share), interval=interval),
            "teacache": recipes.teacache(limit=float(f"{self.limit(computed):.4g}"), polynomial=rounded, domain=domain),
            "magcache": recipes.magcache(ratios=tuple(round(ratio, 6) for ratio in self.ratios)),
        }
        return {name: recipe.model_copy(update={"name": f"{name}-profiled"}) for name, recipe in made.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, for JSON."""
        coefficients, domain, fit = self.polynomial()
        return {
            "lists": self.lists,
            "served": {name: list(span) for name, span in self.served.items()},
            "steps": self.steps,
            "runs": self.runs,
            "change": self.change,
            "foreground": self.foreground,
            "ratios": self.ratios,
            "polynomial": list(coefficients),
            "domain": list(domain),
            "r_squared": fit,
        }


def profile(pipe: Any, request: Request, tell: Callable[[str], None] = lambda _: None) -> Profile:
    """Run every prompt of `request` in full and measure the blocks of every denoiser that runs.

    Holds one residual per block while it runs. Raises `RefusedError` where the blocks of a network cannot be told
    apart or two networks have other lists of blocks, and what `generate` raises.
    """
    with accelerate(pipe, "plain") as session:
        seams = [ProfileSeam(gate) for gate in session.gates]
        for gate, seam in zip(session.gates, seams, strict=True):
            gate.seam = seam
        for result in generate(pipe, session, request):
            tell(f"{result.prompt.text!r}, seed {result.prompt.seed}: {result.seconds:.1f} s")
        steps = session.trace.runs[-1].steps
    ran = [seam for seam in seams if seam.called]
    for seam in ran:
        if seam.reason or not any(seam.runs):
            raise RefusedError(
                f"{seam.gate.site}, a {type(seam.gate.model).__name__}, cannot be profiled:"
                f" {seam.reason or 'it ran at one step only, and its blocks are compared from step to step'}."
                " Recipes that cache the whole network, such as easycache, need no profile."
            )
    return _summary(ran, steps)


def _summary(seams: list[ProfileSeam], steps: int) -> Profile:
    """Medians over steps, runs and networks of [input, output, ratio, *blocks]."""
    lists = [{stack.name: stack.num for stack in seam.gates.stacks} for seam in seams]
    if any(found != lists[0] for found in lists):
        raise RefusedError(
            f"{' and '.join(seam.gate.site for seam in seams)} have other lists of blocks ({lists}), so no recipe holds for"
            " both. Profile each with a pipeline of its own."
        )
    # Each step belongs to one network; the first step of each has none before it to be compared with.
    runs = [{i: row for part in parts for i, row in part.items()} for parts in zip(*(s.runs for s in seams), strict=True)]
    runs = [dict(sorted(run.items())) for run in runs if run]
    table = [row for run in runs for row in run.values()]
    pairs = [(row[0], row[1]) for row in table if math.isfinite(row[0]) and math.isfinite(row[1])]
    if len(pairs) < 2:
        raise RefusedError("Too few steps to profile; run at least 4 steps.")
    ratios = [[run[i][2] for run in runs if i in run] for i in range(max(map(max, runs)) + 1)]
    lifts = [seam.foreground for seam in seams]
    unseen = next((lift for lift in lifts if isinstance(lift, str)), None)
    return Profile(
        lists=lists[0],
        served={seam.gate.site: (min(seam.called), max(seam.called)) for seam in seams},
        steps=steps,
        runs=len(runs),
        change=[statistics.median(row[3 + block] for row in table) for block in range(len(table[0]) - 3)],
        foreground=unseen or [statistics.mean(of) for of in zip(*lifts, strict=True)],
        ratios=[statistics.median(of) if of else 1.0 for of in ratios],
        pairs=pairs,
    )


def _computed(rule: Drift, changes: Sequence[float]) -> float:
    """Share of a run's steps that `rule` computes when the signal reads `changes`; its first step has none."""
    state, total = rule.start(), len(changes) + 1
    skips = [state.skip(Step(i, total, 1 - i / total), None if i == 0 else changes[i - 1]) for i in range(total)]
    return 1.0 - sum(skips) / total
