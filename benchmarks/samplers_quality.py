"""What evaluations buy beside more steps: searched noises, and walking again. All of DPM-Solver++(2M) on even times.

    PYTHONPATH=. python benchmarks/samplers_quality.py noises [--model tiny-image] [--prompts 20] [--steps 10] [--times 2 4 8]
    PYTHONPATH=. python benchmarks/samplers_quality.py travel [--model tiny-image] [--count 60] [--steps 10]

noises: accuracy by evaluations per picture or clip, for each search and for as many evaluations in one run. The
judge is the verifier, too, so its accuracy is what a search maximises: `frechet` and the rows of another verifier say more.
travel: accuracy, Frechet distance and recall at equal evaluations. Both write benchmarks/results/cpu-2core/samplers-WHAT.json (for tiny-image) or samplers-WHAT-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.pipelines.bench.shots import Frames, Sample, judged
from hasten.pipelines.host import hardware
from hasten.pipelines.judge import DIGITS
from hasten.pipelines.noise_search import rows_of, search_noise
from hasten.pipelines.tiny_models import call_defaults, load
from hasten.pipelines.verifiers import digits
from hasten.recipe import Recipe
from hasten.report_forms import installed_versions
from hasten.samplers.solver import Solver
from hasten.samplers.travel import TimeTravel

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-2core"
PLACES = ("top left", "top right", "bottom left", "bottom right")
WAYS = ("left, slowly", "right, quickly", "up, slowly", "down, quickly")
EVEN = Recipe(name="even", sampler=Solver(name="dpm++", spacing="trailing"))


def samples(model: str, count: int) -> list[Sample]:
    """Digits and places, or ways, in turn; seeds far enough apart that no two searches try the same noise."""
    where = [f"moving {way}" for way in WAYS] if model == "tiny-video" else [f"at the {place}" for place in PLACES]
    return [Sample(f"a {DIGITS[i % 10]} {where[(i // 10 + i) % 4]}", 10_000 * (i + 1)) for i in range(count)]


class Table:
    """Rows as they are measured, written after each."""

    def __init__(self, what: str, model: str, chosen: list[Sample]) -> None:
        self.what, self.model, self.samples, self.rows = what, model, chosen, list[dict[str, Any]]()
        self.facts = {"command": f"samplers-{what}", "versions": installed_versions(), "hardware": hardware("cpu")}

    def add(self, label: str, nfe: float, make: Callable[[], list[Frames]], control: str | None = None, **more: Any) -> None:
        began = time.perf_counter()
        pictures = make()
        scores = [digits(picture, sample.prompt) for picture, sample in zip(pictures, self.samples, strict=True)]
        row = {"model": self.model, "recipe": label, "control": control, "nfe": nfe, "n": len(pictures),
               "log_probability": sum(scores) / len(scores), "seconds": time.perf_counter() - began} | more  # fmt: skip
        self.rows.append(row | judged(pictures, self.samples))
        print(json.dumps(self.rows[-1]), flush=True)
        file = RESULTS / f"samplers-{self.what}{'' if self.model == 'tiny-image' else f'-{self.model}'}.json"
        file.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")


def plain(pipe: Any, call: dict[str, Any], chosen: list[Sample], recipe: Recipe, steps: int, batch: int = 10) -> list[Frames]:
    """One picture of each sample."""
    found: list[Frames] = []
    with hasten.accelerate(pipe, recipe):
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            noises = [torch.Generator().manual_seed(sample.seed) for sample in part]
            words = [sample.prompt for sample in part]
            found += rows_of(pipe(prompt=words, generator=noises, **{**call, "num_inference_steps": steps, "output_type": "np"}))
    return found


def noises(pipe: Any, call: dict[str, Any], table: Table, n: int, sizes: list[int]) -> None:
    chosen = table.samples

    def searched(how: str, budget: int, verifier: str = "digits") -> list[Frames]:
        found = []
        with hasten.accelerate(pipe, EVEN):
            for sample in chosen:
                asked = {**call, "num_inference_steps": n}
                found.append(search_noise(pipe, sample.prompt, verifier, how=how, budget=budget, seed=sample.seed, **asked).frames)
        return found

    for steps in (n, *(times * n for times in sizes)):
        table.add("one run", steps, lambda steps=steps: plain(pipe, call, chosen, EVEN, steps), "fewer_steps")
    for how, times in [("random", times) for times in sizes] + [(how, times) for how in ("zero-order", "paths") for times in sizes if times >= 4]:
        table.add(f"{how} search", times * n, lambda how=how, times=times: searched(how, times * n))
    most = min(4, max(sizes))
    table.add("random search by sharpness", most * n, lambda: searched("random", most * n, "sharpness"))


def travel(pipe: Any, call: dict[str, Any], table: Table, n: int) -> None:
    chosen = table.samples
    travels = {
        "early": TimeTravel(begin=0.0, end=0.4, spacing="trailing"), "middle": TimeTravel(begin=0.3, end=0.7, spacing="trailing"),
        "late": TimeTravel(begin=0.6, end=1.0, back=1, spacing="trailing"),
        "middle, three walks": TimeTravel(begin=0.3, end=0.7, again=2, spacing="trailing"),
    }  # fmt: skip
    table.add("no travel", n, lambda: plain(pipe, call, chosen, EVEN, n), "fewer_steps")
    for label, part in travels.items():
        nfe, recipe = len(part.plan(n)), Recipe(name="travel", sampler=part)
        table.add(f"travel, {label}", nfe, lambda recipe=recipe: plain(pipe, call, chosen, recipe, n))
        if not any(row["nfe"] == nfe and row["control"] for row in table.rows):
            table.add("no travel", nfe, lambda nfe=nfe: plain(pipe, call, chosen, EVEN, nfe), "fewer_steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["noises", "travel"])
    parser.add_argument("--model", choices=["tiny-image", "tiny-video"], default="tiny-image")
    parser.add_argument("--times", type=int, nargs="+", default=[2, 4, 8], help="what a search may cost, in whole runs")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe, call = load(options.model), call_defaults(options.model)
    pipe.set_progress_bar_config(disable=True)
    if options.what == "noises":
        noises(pipe, call, Table("noises", options.model, samples(options.model, options.prompts)), options.steps, options.times)
    else:
        travel(pipe, call, Table("travel", options.model, samples(options.model, options.count)), options.steps)


if __name__ == "__main__":
    main()
