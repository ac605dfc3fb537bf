"""Solvers fitted to plain runs: where to evaluate, and what the latest outputs weigh, so that few steps end where many did.

A first-order solver is given a mix of its latest outputs (`Solver.weights`), and where the second branch is left out, the held
difference times a factor (`ListedGuidance.factors`). Levels, weights and factors (`few.Few`), some fifteen numbers, are moved until the final latents are those of the plain runs: Gauss-Newton with Levenberg's damping, the derivatives by running
the pipeline once for each number, and Broyden's corrections of them in between. Bespoke Non-Stationary Solvers (arXiv 2403.01329) train such numbers by gradients on
hundreds of trajectories; here a few runs are enough, for each says as much as its latents have elements.

Shapes: P numbers; r [M] the residual, the latents of all samples in one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hasten.pipelines.bench.candidates import Candidate, ours
from hasten.pipelines.bench.shots import shoot
from hasten.pipelines.tune.few import Few, start
from hasten.pipelines.tune.prefix import Prefix
from hasten.pipelines.tune.trials import MANY, Bench
from hasten.recipe import Guidance, Recipe
from hasten.scheduler import is_flow

ROUNDS = 3
"""Times that derivatives are measured; the first gains most."""

STEPS = 6
"""Steps that are taken with them."""

ENOUGH = 0.95
"""What leaves more than this share of the squared error is the last."""

DAMPED = (3e-3, 3e-2, 0.3, 3.0)
"""Levenberg's factors that are tried, the boldest first."""

SHARE = 3
"""A round begins only while the time is enough for so many."""


def levels_of(scheduler: Any) -> tuple[float, ...]:
    """The levels of the run that was made last, as `Solver.times` has them; empty where they do not fall from all noise."""
    if is_flow(scheduler):
        found = [float(sigma) for sigma in scheduler.sigmas if float(sigma) > 0]
    else:
        found = [(float(t) + 1) / scheduler.config.num_train_timesteps for t in scheduler.timesteps]
    found = [min(1.0, level) for level in found]
    falls = all(a > b for a, b in pairwise(found))
    return (1.0, *found[1:]) if falls and found and found[-1] > 0 and found[0] > 0.9 else ()


@dataclass
class Fitting:
    """Fits solvers on a bench's samples. levels: of the plain run. left: seconds that may still be spent.

    known: what was fitted so far by (evaluations, guidance), and its mean error (`_residual`) on the samples that decided.
    """

    bench: Bench
    levels: tuple[float, ...]
    left: Callable[[], float] = lambda: math.inf
    known: dict[tuple[int, Guidance | None], tuple[Few, float]] = field(default_factory=dict)
    prefix: Prefix = field(default_factory=Prefix)

    @classmethod
    def on(cls, bench: Bench, left: Callable[[], float]) -> Fitting | None:
        """None where the pipeline does not hand out its latents, or its levels are not from all noise down."""
        levels = levels_of(bench.pipe.scheduler)
        return cls(bench, levels, left) if levels and all(shot.latents is not None for shot in bench.plain) else None

    def fit(self, num: int, guidance: Guidance | None) -> Recipe:
        """The solver of `num` evaluations that ends nearest the plain runs, beside this guidance. Begins with what is known of as
        many evaluations; ends early where the time is over."""
        if (num, guidance) not in self.known:
            self.known[num, guidance] = self._searched(num, guidance)
        return self.known[num, guidance][0].recipe

    def _searched(self, num: int, guidance: Guidance | None) -> tuple[Few, float]:
        name = "euler" if is_flow(self.bench.pipe.scheduler) else "ddim"
        near = self.known.get((num, None))
        few = start(self.levels, num, name, guidance) if near is None else Few(near[0].solver, guidance).told
        residual = self._residual(few)
        best = self._beside(few, residual), few
        for _ in range(ROUNDS):
            if self.left() < SHARE * self._seconds(few.size, num):
                break
            before = float(residual.square().sum())
            for nearer, left in self._round(few, residual):
                best = min(best, (self._beside(nearer, left), nearer), key=lambda each: each[0])
                few, residual = nearer, left
            if float(residual.square().sum()) > ENOUGH * before:
                break
        self.prefix.forget()
        return best[1].rounded, best[0]

    @property
    def watched(self) -> list[int]:
        """Samples that are not fitted on: of what is found on the way, that counts which is nearest on these. Where they are few,
        all are needed for fitting, and there are none."""
        return list(range(len(self.bench.samples)))[2::3] if len(self.bench.samples) >= MANY else []

    def _beside(self, few: Few, residual: Tensor) -> float:
        """Mean error on the watched samples; on the fitted ones, whose residual is known, where none are watched."""
        seen = self._residual(few, self.watched) if self.watched else residual
        return float(seen.square().mean())

    def _round(self, few: Few, residual: Tensor) -> Iterator[tuple[Few, Tensor]]:
        """Solvers ever nearer the plain runs, and their residuals. The derivatives are measured once; then steps are taken for as
        long as they gain, each of which corrects them along its own way (Broyden)."""
        slopes = self._slopes(few, residual)
        for _ in range(STEPS):
            taken = self._step(few, residual, slopes)
            if taken is None:
                break
            way, few, after = taken
            yield few, after
            gain = float(after.square().sum() / residual.square().sum().clamp_min(1e-30))
            slopes += torch.outer(residual - after - slopes @ way, way) / way.square().sum()
            residual = after
            if gain > ENOUGH:
                break

    def _slopes(self, few: Few, residual: Tensor) -> Tensor:
        """How much of the residual each number takes away [M, P]."""
        latents, columns = self.bench.plain[0].latents, []
        assert latents is not None
        step = 1e-3 if latents.dtype in (torch.float32, torch.float64) else 2e-2
        for index in range(few.size):
            for by in (step, -step):  # a level close above another one can be moved one way only
                changed = few.moved([by if number == index else 0.0 for number in range(few.size)])
                if changed is not None:
                    columns.append((residual - self._residual(changed, keep=False)) / by)
                    break
            else:
                columns.append(torch.zeros_like(residual))
        return torch.stack(columns, 1)

    def _step(self, few: Few, residual: Tensor, slopes: Tensor) -> tuple[Tensor, Few, Tensor] | None:
        """The boldest step that gains: where it went [P], the solver there and its residual; None where none does."""
        gram, pull = slopes.T @ slopes, slopes.T @ residual
        scale = gram.diagonal()
        for damp in DAMPED:
            way = few.within(torch.linalg.solve(gram + torch.diag(damp * scale + 1e-4 * scale.mean()), pull))
            trial = few.moved(way.tolist())
            if trial is None or not trial.apart:
                continue
            after = self._residual(trial)
            if float(after.square().sum()) < float(residual.square().sum()):
                return way, trial, after
        return None

    def _residual(self, few: Few, samples: Sequence[int] | None = None, keep: bool = True) -> Tensor:
        """float64 [M]: what is missing to the plain runs' final latents, of the fitted samples where none are named, each times its
        own root mean square: a budget is missed by the worst sample, so that fourth powers are added up. Infinite where a run
        gives no numbers."""
        chosen = self._fitted() if samples is None else samples
        candidate, parts = ours("fit", few.recipe), []
        for number in chosen:
            found, plain = self._latents(candidate, number, keep), self.bench.plain[number].latents
            assert found is not None and plain is not None
            missing = (plain.double() - found.double()).flatten().cpu()
            parts.append(missing * missing.square().mean().sqrt())
        return torch.cat(parts).nan_to_num(nan=math.inf)

    def _latents(self, candidate: Candidate, number: int, keep: bool) -> Tensor | None:
        """Of a run that is not decoded, and makes no evaluation that the last kept one of the sample has made."""
        with self.prefix.beside(self.bench.pipe, number, keep):
            return shoot(self.bench.pipe, self.bench.samples[number], self.bench.call, candidate, decoded=False).latents

    def _fitted(self) -> list[int]:
        return [number for number in range(len(self.bench.samples)) if number not in self.watched]

    def _seconds(self, count: int, num: int) -> float:
        """About what a round takes: of the runs that differ in one number, half is known (`Prefix`)."""
        share: float = (num + 1) / self.bench.call["num_inference_steps"]
        return (count / 2 + 1) * len(self._fitted()) * share * self.bench.seconds
