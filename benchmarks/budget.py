"""Is a named tolerance met? `auto` at several latent errors on prompts and seeds that nothing was tuned on.

    python benchmarks/budget.py --model tiny-image --samples 32
    python benchmarks/budget.py --model tiny-video --samples 14 --tolerances 0.025 0.05 0.1
    python benchmarks/budget.py --model tiny-flux --samples 8 --solver unipc --steps 20

Prints, per tolerance: computed share, median and largest latent error to the plain run, and the share of samples
within the tolerance; below it `balanced` for comparison, which knows no tolerance.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten import metrics
from hasten.cli.bench import own_prompts
from hasten.pipelines.solver import other_scheduler
from hasten.pipelines.tiny_models import call_defaults


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-image")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--solver", default="keep", help="keep, or another of diffusers' solvers: euler, unipc, dpm++")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe = hasten.load(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = other_scheduler(pipe.scheduler, arguments.solver)
    call: dict[str, Any] = {**call_defaults(arguments.model), "output_type": "latent"}
    call["num_inference_steps"] = arguments.steps
    prompts = own_prompts(arguments.model == "tiny-video")
    samples = [(prompt, seed) for seed in range(1000, 1000 + arguments.samples) for prompt in prompts][: arguments.samples]

    def latents(prompt: str, seed: int) -> Tensor:
        return torch.as_tensor(pipe(prompt, generator=torch.Generator().manual_seed(seed), **call)[0])

    plain = [latents(*sample) for sample in samples]
    for tolerance in [*arguments.tolerances, None]:
        recipe = "balanced" if tolerance is None else hasten.Budget(latent_error=tolerance)
        errors, computed = [], []
        for sample, reference in zip(samples, plain, strict=True):
            with hasten.accelerate(pipe, recipe) as run:
                errors.append(metrics.latent_error(latents(*sample), reference))
            computed.append(run.report().computed_fraction)
        met = "" if tolerance is None else f", met by {sum(e <= tolerance for e in errors) / len(errors):.0%}"
        print(
            f"{recipe if tolerance is None else f'auto {tolerance}'}: {statistics.mean(computed):.1%} computed, latent error"
            f" {statistics.median(errors):.4f} median, {max(errors):.4f} worst of {len(errors)}{met}",
            flush=True,
        )


if __name__ == "__main__":
    main()
