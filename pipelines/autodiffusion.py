"""AutoDiffusion without training: search noise levels, and which blocks run at them, for one model.

Li et al., AutoDiffusion, arXiv 2309.10438. What differs: a sequence is judged by the distance of its latents to those of a
fine run from the same noise, a matter of seconds, and not by the Frechet distance of thousands of pictures; the search
starts at the shortest way through recorded fine runs (`hasten.samplers.sequence`); blocks that do not run are stood in for
by what they added at the last step at which all ran, in place of being left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hasten import metrics
from hasten.atomic import atomic_write
from hasten.caching.rules import Listed
from hasten.caching.spans_listed import Timetable
from hasten.caching.stack import StackReuse
from hasten.errors import UsageError
from hasten.forecast import Hold
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.bench.shots import Sample
from hasten.pipelines.path import record_path
from hasten.recipe import Recipe
from hasten.samplers.sequence import Evolution, Found, Recorded, Subset, best_sequence
from hasten.samplers.solver import Solver

PAPER = "AutoDiffusion, arXiv 2309.10438"


@dataclass(slots=True)
class Searched:
    """What a search found. start: the latent error before it. found: of the search; its cost is the error now."""

    recipe: Recipe
    start: float
    found: Found


class Bench:
    """Fine runs of some samples on one pipeline, and how far from them others end.

    call: arguments of the pipeline beside prompt and generator. fine: evaluations of the fine runs, DPM-Solver++(2M) on even
    times. latents: [B, ...] of the fine runs. recorded: their paths.
    """

    def __init__(self, pipe: Any, call: dict[str, Any], samples: Sequence[Sample], *, fine: int = 60) -> None:
        self.pipe, self.call, self.samples = pipe, dict(call), list(samples)
        recipe = Recipe(name="fine", sampler=Solver(name="dpm++", order=2, spacing="trailing"))
        with accelerate(pipe, recipe), record_path(pipe.scheduler) as recorded:
            self.latents = self._latents(fine)
        self.recorded: list[Recorded] = recorded

    def error(self, recipe: Recipe, steps: int) -> float:
        """Relative error of the latents that `recipe` ends with when it is asked for `steps`."""
        with accelerate(self.pipe, recipe):
            return metrics.latent_error(self._latents(steps), self.latents)

    def _latents(self, steps: int) -> Tensor:
        noises = [torch.Generator().manual_seed(sample.seed) for sample in self.samples]
        call = {**self.call, "num_inference_steps": steps, "output_type": "latent"}
        found: Tensor = self.pipe(prompt=[sample.prompt for sample in self.samples], generator=noises, **call)[0]
        return found


def search_times(
    bench: Bench, n: int, *, solver: Literal["euler", "ddim", "dpm++", "unipc"] = "dpm++", evolution: Evolution | None = None
) -> Searched:
    """The n noise levels, out of those of the fine run, at which `solver` (of its usual order) ends nearest to the fine runs.

    It starts from the shortest ways through the recorded runs, for one and two outputs at a time, and from even times.
    Raises `UsageError` where n is not within the fine run.
    """
    runs, evolution = bench.recorded, evolution or Evolution()
    total = runs[0].steps

    def recipe(chosen: Subset) -> Recipe:
        times = tuple(round(runs[0].shares[i], 6) for i in chosen)
        return Recipe(name=f"autodiffusion-{n}", sampler=Solver(name=solver, times=times), paper=PAPER)

    starts = [best_sequence(runs, n, order=order) for order in (2, 1)] + [tuple(i * total // n for i in range(n))]
    found = evolution.search(dict.fromkeys(starts), total, lambda chosen: bench.error(recipe(chosen), n), fixed=(0,))
    return Searched(recipe(found.best), found.tried[starts[0]], found)


def search_blocks(bench: Bench, recipe: Recipe, n: int, blocks: int, out: float, *, evolution: Evolution | None = None) -> Searched:
    """Which of the network's `blocks` to leave out at which of n steps, a share `out` of all there are, under `recipe`.

    The first step runs in full; from then on, what a block added at the last step at which all ran stands in for it. It starts from
    blocks left out evenly, and from whole steps. Raises `UsageError` where nothing or the first step, too, would be left out.
    """
    cells, missing = n * blocks, round(out * n * blocks)
    if not 0 < missing <= cells - blocks:
        raise UsageError(
            f"To leave out {out:.0%} of {n} x {blocks} is {missing} blocks; allowed are 1 to {cells - blocks}, as the first step"
            " runs in full. Choose another share, or more steps."
        )
    first, kept = range(blocks), cells - missing

    def made(runs: Subset) -> Recipe:
        table = tuple(tuple(b for b in range(blocks) if step * blocks + b not in set(runs)) for step in range(n))
        # Every step may leave out what its row says: the rule is only asked at the first.
        reuse = StackReuse(lead=0, span=Timetable(out=table), rule=Listed(at=(0.0,)), forecast=Hold())
        name = f"{recipe.name}-{missing}-blocks" if recipe.name else f"{missing}-blocks"
        return recipe.model_copy(update={"name": name, "reuse": reuse})

    rest, spare = range(blocks, cells), kept - blocks
    even = (*first, *(rest[i * len(rest) // spare] for i in range(spare)))
    every = sorted(rest, key=lambda cell: ((cell // blocks) % 2 != 0, cell))[:spare]
    starts = dict.fromkeys((even, tuple(sorted((*first, *every)))))
    search = evolution or Evolution()
    found = search.search(starts, cells, lambda runs: bench.error(made(runs), n), fixed=first)
    return Searched(made(found.best), found.tried[even], found)


def write(recipe: Recipe, path: Path) -> None:
    """Write a searched recipe as YAML, which `hasten.accelerate(pipe, path)` takes. Raises `OutputError`."""
    atomic_write(path, recipe.to_yaml())
