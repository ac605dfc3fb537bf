"""One account for cache and guidance, or none: which share of runs keeps a tolerance, at how many evaluations?

    python benchmarks/budget_levels.py --model tiny-image --samples 8 --tolerances 0.126 --json FILE

Three ways on the same prompts and noises: `reuse` is the error budget with both branches at every computed step; `shared` leaves
unconditional evaluations out besides, and both spend of one account; `apart` does the same with the whole tolerance for each,
which shows why one account is needed. Prints, and writes as JSON rows, the computed share, median and largest latent error to the
plain run, the share of runs within the tolerance, and what the runs estimated of themselves.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import hasten
from hasten import metrics
from hasten.account import Account
from hasten.cli.bench import own_prompts
from hasten.cli.output import Output
from hasten.pipelines.recipes import recipe
from hasten.pipelines.tiny_models import call_defaults
from hasten.recipe import Recipe
from hasten.samplers.guidance_ledger import LedgerGuidance, LedgerGuidanceState

Sample = tuple[str, int]


class ApartGuidance(LedgerGuidance):
    """The same with an account of its own beside that of reuse."""

    kind: ClassVar[str] = "ledger-apart"

    def start(self) -> LedgerGuidanceState:
        return _Apart(self)


class _Apart(LedgerGuidanceState):
    def share(self, account: Account, times: Sequence[float]) -> None:
        super().share(Account(self.policy.tolerance), times)


def ways(tolerance: float, after: float = 0.5) -> dict[str, Recipe]:
    """Name -> recipe. after: share of the run before which u is always known."""
    alone = recipe(f"auto:latent_error={tolerance}").model_copy(update={"guidance": None})
    both = {"shared": LedgerGuidance(tolerance=tolerance, after=after), "apart": ApartGuidance(tolerance=tolerance, after=after)}
    return {"reuse": alone} | {name: alone.model_copy(update={"guidance": part}) for name, part in both.items()}


def rows(
    pipe: Any, model: str, samples: Sequence[Sample], plain: Sequence[Tensor], tolerances: Sequence[float], after: float = 0.5
) -> list[dict[str, Any]]:
    """One row per tolerance and way, printed as they come."""
    found = []
    for tolerance in tolerances:
        for name, way in ways(tolerance, after).items():
            errors, computed, guessed, seconds = [], [], [], 0.0
            for sample, reference in zip(samples, plain, strict=True):
                began = time.perf_counter()
                with hasten.accelerate(pipe, way) as run:
                    errors.append(metrics.latent_error(latents(pipe, model, [sample])[0], reference))
                seconds += time.perf_counter() - began
                report = run.report()
                computed.append(report.computed_fraction)
                guessed.append(report.estimated_error[0])
            row = {
                "model": model, "recipe": name, "tolerance": tolerance, "computed_fraction": statistics.mean(computed),
                "latent_error": statistics.median(errors), "latent_error_worst": max(errors), "n": len(errors), "seconds": seconds,
                "kept": sum(error <= tolerance for error in errors) / len(errors), "estimated": statistics.median(guessed), "errors": errors,
            }  # fmt: skip
            found.append(row)
            print(
                f"{model} {tolerance} {name}: {row['computed_fraction']:.1%} computed, latent error {row['latent_error']:.4f} median,"
                f" {max(errors):.4f} worst of {len(errors)}, within {row['kept']:.0%}, estimated {row['estimated']:.4f}", flush=True,
            )  # fmt: skip
    return found


def latents(pipe: Any, model: str, samples: Sequence[Sample]) -> list[Tensor]:
    """Final latents of the samples, evaluated as one batch."""
    noises = [torch.Generator().manual_seed(seed) for _, seed in samples]
    call = {**call_defaults(model), "output_type": "latent"}
    return list(torch.as_tensor(pipe([prompt for prompt, _ in samples], generator=noises, **call)[0]).split(1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-image")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.126])
    parser.add_argument("--after", type=float, default=0.5, help="share of the run before which both branches are evaluated")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe = hasten.load(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = own_prompts(arguments.model == "tiny-video")
    samples = [(prompt, seed) for seed in range(1000, 1000 + arguments.samples) for prompt in prompts][: arguments.samples]
    output = Output("budget levels", arguments.json)
    with output.open():
        found = rows(pipe, arguments.model, samples, latents(pipe, arguments.model, samples), arguments.tolerances, arguments.after)
        output.finish(found)


if __name__ == "__main__":
    main()
