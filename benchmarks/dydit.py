"""What a student of `hasten train dydit` is worth beside its teacher and what else the same work buys. The table of docs/training-cheaper.md.

    python benchmarks/dydit.py RUN/student [RUN/student ...]

Everybody makes the same pictures from the same noise, with guidance, by the pipeline's own solver. For each student: the
teacher by as many steps as cost the same; the teacher with the student's routers alone; and the teacher with as much of its
width left out by the size of its weights. Prints the work that runs, multiply-adds as counted, processor time, the distance
of the latents from the teacher's (relative, median), and how many pictures the judge reads as their prompt.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten.caching.routed import RoutedReuse
from hasten.caching.routers import Routers
from hasten.caching.width import WidthReuse, WidthTable
from hasten.pipelines.judge import Judge
from hasten.pipelines.recipes import recipe
from hasten.pipelines.tiny_models import call_defaults, load
from hasten.pipelines.work import watch
from hasten.recipe import Recipe

MODEL = "tiny-image"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Contest:
    """Pictures of ten digits from the same noise, and what they cost."""

    def __init__(self, count: int, steps: int) -> None:
        self.pipe, self.steps = load(MODEL), steps
        self.pipe.set_progress_bar_config(disable=True)
        self.prompts = [f"a {DIGITS[number % 10]}" for number in range(count)]
        network = self.pipe.transformer
        shape = (count, network.config.in_channels, network.config.sample_size, network.config.sample_size)
        self.z = torch.randn(shape, generator=torch.Generator().manual_seed(4321))
        self.judge = Judge.load()
        self.wanted, self.work = self.latents(steps)
        self.row("teacher", self.wanted, 1.0, self.work, self.seconds)

    def latents(self, steps: int) -> tuple[Tensor, int]:
        """(latents, floating point operations); sets `seconds` of processor time."""
        call: dict[str, Any] = call_defaults(MODEL) | {"num_inference_steps": steps, "output_type": "latent"}
        with torch.no_grad():
            began = time.process_time()
            made = self.pipe(self.prompts, latents=self.z.clone(), **call)[0]
            self.seconds = time.process_time() - began
            with watch(self.pipe) as work:  # a run of its own: counting slows it down
                self.pipe(self.prompts[:1], latents=self.z[:1].clone(), **call)
        return made, work.flops

    def row(self, name: str, made: Tensor, ran: float, work: int, seconds: float) -> None:
        off = (made - self.wanted).flatten(1).norm(dim=1) / self.wanted.flatten(1).norm(dim=1)
        with torch.no_grad():
            pictures = self.pipe.vae.decode(made / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
        shown = (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        right = self.judge.prompt_accuracy(list(shown), self.prompts)["all"]
        print(
            f"| {name} | {ran:.2f} | {work / self.work:.2f} | {seconds:.2f} | {float(off.median()):.3f} | {right:.0%} |", flush=True
        )

    def under(self, name: str, way: Recipe) -> float:
        with hasten.accelerate(self.pipe, way) as run:
            first = call_defaults(MODEL) | {"num_inference_steps": 2, "output_type": "latent"}
            self.pipe(self.prompts[:1], latents=self.z[:1].clone(), **first)  # it proves that cutting is right
            made, work = self.latents(self.steps)
            ran = run.report().computed_fraction
        self.row(name, made, ran, work, self.seconds)
        return ran


def by_size(routers: Routers, work: float) -> WidthReuse:
    """As much of the width by the size of its weights: channels first, and half of the heads where that is not enough."""
    channels = sum(one.cost for one in routers.routed if one.width)
    heads = sum(one.cost for one in routers.routed if not one.width)
    share = 1 - (1 - work) / channels
    if share >= 0.25:
        return WidthReuse(width=WidthTable(channels=((share,),)), order="norm")
    share = 1 - (1 - work - heads / 2) / channels
    return WidthReuse(width=WidthTable(heads=((0.5,),), channels=((share,),)), order="norm")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("students", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print("| who | work by the report | multiply-adds | seconds of processor | distance of latents | prompt read |")
    print("|---|---:|---:|---:|---:|---:|")
    contest = Contest(arguments.count, arguments.steps)
    for student in arguments.students:
        way = recipe(str(student / "recipe.yaml"))
        ran = contest.under(f"student {student.parent.name}", way)
        fewer = max(1, round(arguments.steps * ran))
        made, work = contest.latents(fewer)
        contest.row(f"teacher, {fewer} steps", made, 1.0, work, contest.seconds)
        file = student / "routers.safetensors"
        contest.under("teacher, the same routers", Recipe(reuse=RoutedReuse(path=str(file))))
        contest.under("teacher, least weights left out", Recipe(reuse=by_size(Routers.load(file), ran)))


if __name__ == "__main__":
    main()
