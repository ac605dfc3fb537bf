"""Searched noise levels and blocks against even ones, on held-out prompts.

    PYTHONPATH=. python benchmarks/samplers_sequences.py tiny-image [--steps 6 10] [--trials 40] [--tuning 6] [--held 8]

Each row: latent error to fine runs (60 evaluations) from the same noise, on the prompts of the search and on others. Writes
benchmarks/results/cpu-2core/samplers-sequences-MODEL.json and, with --recipes FOLDER, the searched recipes as YAML.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

from tune_presets import TUNING

from hasten.pipelines.autodiffusion import Bench, search_blocks, search_times, write
from hasten.pipelines.bench.shots import Sample
from hasten.pipelines.host import hardware
from hasten.pipelines.tiny_models import call_defaults, load
from hasten.recipe import Recipe
from hasten.report_forms import installed_versions
from hasten.samplers.sequence import Evolution, best_sequence
from hasten.samplers.solver import Solver

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-2core"

HELD = {
    "tiny-image": [Sample(f"a {digit} at the {place}", 300 + i) for i, (digit, place) in enumerate((
        ("three", "top left"), ("seven", "bottom right"), ("four", "top right"), ("nine", "bottom left"),
        ("five", "bottom right"), ("two", "bottom left"), ("zero", "top left"), ("eight", "top right")))],
    "tiny-video": [Sample(f"a {digit} moving {way}", 300 + i) for i, (digit, way) in enumerate((
        ("three", "right, slowly"), ("seven", "left, quickly"), ("four", "down, slowly"), ("nine", "up, quickly")))],
}  # fmt: skip

BLOCKS = {"tiny-image": 6, "tiny-video": 12}


class Table:
    """Rows as they are measured, written after each."""

    def __init__(self, model: str, tuning: Bench, held: Bench, trials: int) -> None:
        self.model, self.tuning, self.held, self.rows = model, tuning, held, list[dict[str, Any]]()
        self.facts = {"command": "samplers-sequences", "versions": installed_versions(), "hardware": hardware("cpu"),
                      "n_tuning": len(tuning.samples), "n": len(held.samples), "trials": trials}  # fmt: skip

    def add(self, label: str, recipe: Recipe, steps: int, work: float, **more: Any) -> None:
        row = {"model": self.model, "recipe": label, "steps": steps, "computed_fraction": work,
               "latent_error_tuning": self.tuning.error(recipe, steps), "latent_error": self.held.error(recipe, steps)} | more  # fmt: skip
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        file = RESULTS / f"samplers-sequences-{self.model}.json"
        file.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")


def measure(table: Table, n: int, trials: int, folder: Path | None) -> Solver:
    """Even levels, the shortest way, and the searched sequence, all of DPM-Solver++(2M); the searched solver."""
    for label, solver in (
        ("dpm++, even times", Solver(name="dpm++", spacing="trailing")),
        ("unipc, its own levels", Solver(name="unipc")),
        ("dpm++, karras", Solver(name="dpm++", spacing="karras")),
    ):
        table.add(label, Recipe(name="even", sampler=solver), n, 1.0, control="fewer_steps")
    runs = table.tuning.recorded
    times = tuple(round(runs[0].shares[i], 6) for i in best_sequence(runs, n, order=2))
    table.add("dpm++, shortest way", Recipe(name="way", sampler=Solver(name="dpm++", times=times)), n, 1.0, times=times)
    began = time.perf_counter()
    searched = search_times(table.tuning, n, evolution=Evolution(trials=trials))
    seconds = time.perf_counter() - began
    assert isinstance(searched.recipe.sampler, Solver)
    table.add("dpm++, searched", searched.recipe, n, 1.0, times=searched.recipe.sampler.times, seconds=seconds)
    if folder is not None:
        write(searched.recipe.model_copy(update={"models": (table.model,)}), folder / f"{table.model}-{n}-calls.yaml")
    return searched.recipe.sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(HELD))
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 10])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--tuning", type=int, default=6)
    parser.add_argument("--held", type=int, default=8)
    parser.add_argument("--out", type=float, default=0.3, help="share of the blocks to leave out, at the last of --steps; 0: none")
    parser.add_argument("--recipes", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe, call = load(options.model), call_defaults(options.model)
    pipe.set_progress_bar_config(disable=True)
    tuning = Bench(pipe, call, TUNING[options.model][: options.tuning])
    table = Table(options.model, tuning, Bench(pipe, call, HELD[options.model][: options.held]), options.trials)
    solvers = [measure(table, n, options.trials, options.recipes) for n in options.steps]
    if options.out:
        n, base = options.steps[-1], Recipe(name="searched", sampler=solvers[-1])
        for steps in sorted({round(n * (1 - options.out)), round(n * (1 - options.out)) + 1}):
            table.add("dpm++, even times", Recipe(sampler=Solver(name="dpm++", spacing="trailing")), steps, steps / n, control="fewer_steps")
        began = time.perf_counter()
        found = search_blocks(tuning, base, n, BLOCKS[options.model], options.out, evolution=Evolution(trials=options.trials))
        work = 1 - options.out
        table.add("dpm++, searched, blocks searched", found.recipe, n, work, start=found.start, seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
