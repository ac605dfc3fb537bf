"""What evaluations buy beside more steps: searched noises, and walking again. All of DPM-Solver++(2M) on even times.

    PYTHONPATH=. python benchmarks/samplers_quality.py noises [--prompts 20] [--steps 10]
    PYTHONPATH=. python benchmarks/samplers_quality.py travel [--count 60] [--steps 10]

noises: accuracy of tiny-image by evaluations per picture, for each search and for as many evaluations in one run. The
judge is the verifier, too, so its accuracy is what a search maximises: `frechet` and the rows of another verifier say more.
travel: accuracy, Frechet distance and recall at equal evaluations. Both write benchmarks/results/cpu-2core/samplers-WHAT.json.
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
EVEN = Recipe(name="even", sampler=Solver(name="dpm++", spacing="trailing"))


def samples(count: int) -> list[Sample]:
    """Digits and places in turn; seeds far enough apart that no two searches try the same noise."""
    return [Sample(f"a {DIGITS[i % 10]} at the {PLACES[(i // 10 + i) % 4]}", 10_000 * (i + 1)) for i in range(count)]


class Table:
    """Rows as they are measured, written after each."""

    def __init__(self, what: str, chosen: list[Sample]) -> None:
        self.what, self.samples, self.rows = what, chosen, list[dict[str, Any]]()
        self.facts = {"command": f"samplers-{what}", "versions": installed_versions(), "hardware": hardware("cpu")}

    def add(self, label: str, nfe: float, make: Callable[[], list[Frames]], control: str | None = None, **more: Any) -> None:
        began = time.perf_counter()
        pictures = make()
        scores = [digits(picture, sample.prompt) for picture, sample in zip(pictures, self.samples, strict=True)]
        row = {"model": "tiny-image", "recipe": label, "control": control, "nfe": nfe, "n": len(pictures),
               "log_probability": sum(scores) / len(scores), "seconds": time.perf_counter() - began} | more  # fmt: skip
        self.rows.append(row | judged(pictures, self.samples))
        print(json.dumps(self.rows[-1]), flush=True)
        file = RESULTS / f"samplers-{self.what}.json"
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


def noises(pipe: Any, call: dict[str, Any], chosen: list[Sample], n: int) -> None:
    table = Table("noises", chosen)

    def searched(how: str, budget: int, verifier: str = "digits") -> list[Frames]:
        found = []
        with hasten.accelerate(pipe, EVEN):
            for sample in chosen:
                asked = {**call, "num_inference_steps": n}
                found.append(search_noise(pipe, sample.prompt, verifier, how=how, budget=budget, seed=sample.seed, **asked).frames)
        return found

    for steps in (n, 2 * n, 4 * n, 8 * n):
        table.add("one run", steps, lambda steps=steps: plain(pipe, call, chosen, EVEN, steps), "fewer_steps")
    for how, times in (("random", 2), ("random", 4), ("random", 8), ("zero-order", 4), ("zero-order", 8), ("paths", 4), ("paths", 8)):
        table.add(f"{how} search", times * n, lambda how=how, times=times: searched(how, times * n))
    table.add("random search by sharpness", 4 * n, lambda: searched("random", 4 * n, "sharpness"))


def travel(pipe: Any, call: dict[str, Any], chosen: list[Sample], n: int) -> None:
    table = Table("travel", chosen)
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
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe, call = load("tiny-image"), call_defaults("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    if options.what == "noises":
        noises(pipe, call, samples(options.prompts), options.steps)
    else:
        travel(pipe, call, samples(options.count), options.steps)


if __name__ == "__main__":
    main()
