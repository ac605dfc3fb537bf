"""One account for cache and attention: does attention do better with a recall that the account can afford than with a fixed one?

    PYTHONPATH=. python benchmarks/budget_attention.py [--model tiny-video] [--samples 3] [--tolerances 0.05 0.126] [--json FILE]

The bundled models are far too small for sparse attention to pay, so that what counts here is what is read (density), how far the
latents end from the plain run's, and what the account says of that. Rows: reuse alone; attention alone at fixed recalls, which
says what its charge is worth (`charged` beside the latent error); both with fixed recalls; both, with attention following.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten import metrics
from hasten.cli.bench import own_prompts
from hasten.cli.output import Output
from hasten.pipelines.recipes import recipe
from hasten.pipelines.tiny_models import call_defaults
from hasten.recipe import Recipe

RECALLS = (0.8, 0.9, 0.95)
NEVER = "+auto:latent_error=0.0000001"
"""A ledger that can afford nothing: it keeps the account, and computes every step."""


def ways(tolerances: Sequence[float], clusters: str) -> list[tuple[str, float | None, Recipe]]:
    """(name, tolerance, recipe) of each row. clusters: further arguments of `semantic`."""
    found: list[tuple[str, float | None, Recipe]] = [
        (f"attention alone, recall {r}", None, recipe(f"semantic:recall={r},{clusters}{NEVER}")) for r in RECALLS
    ]
    for tolerance in tolerances:
        reuse = f"auto:latent_error={tolerance}"
        found.append(("reuse alone", tolerance, recipe(reuse)))
        found += [(f"reuse, recall {r}", tolerance, recipe(f"semantic:recall={r},{clusters}+{reuse}")) for r in RECALLS]
        found.append(("reuse, attention follows", tolerance, recipe(f"semantic:lowest=0.6,{clusters}+{reuse}")))
    return found


def latents(pipe: Any, call: dict[str, Any], sample: tuple[str, int]) -> Tensor:
    output = pipe(sample[0], generator=torch.Generator().manual_seed(sample[1]), **{**call, "output_type": "latent"})
    return torch.as_tensor(output[0])


def measured(pipe: Any, call: dict[str, Any], way: Recipe, samples: Sequence[tuple[str, int]], plain: Sequence[Tensor]) -> dict[str, Any]:
    errors, computed, density, recall, reuse, attention = [], [], [], [], [], []
    for sample, reference in zip(samples, plain, strict=True):
        with hasten.accelerate(pipe, way) as run:
            errors.append(metrics.latent_error(latents(pipe, call, sample), reference))
        report, spent = run.report(), run.trace.runs[-1].error_by_level
        computed.append(report.computed_fraction)
        read = report.attention
        density.append(1.0 if read is None else read.density)
        recall.append(None if read is None else read.recall)
        reuse.append(spent.get("reuse", run.trace.runs[-1].estimated_error or 0.0))
        attention.append(spent.get("attention", 0.0))
    known = [value for value in recall if value is not None]
    return {
        "computed_fraction": statistics.mean(computed), "density": statistics.mean(density), "mass": statistics.mean(known) if known else None,
        "latent_error": statistics.median(errors), "latent_error_worst": max(errors), "n": len(errors), "errors": errors,
        "charged_reuse": statistics.median(reuse), "charged_attention": statistics.median(attention),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-video")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.05, 0.126])
    parser.add_argument("--clusters", default="min_tokens=0,q_size=32,k_size=8")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe = hasten.load(given.model)
    pipe.set_progress_bar_config(disable=True)
    call = {**call_defaults(given.model), "num_inference_steps": given.steps}
    samples = [(prompt, 1000) for prompt in own_prompts(given.model == "tiny-video")][: given.samples]
    output = Output("budget attention", given.json)
    with output.open():
        plain, rows = [latents(pipe, call, sample) for sample in samples], []
        for name, tolerance, way in ways(given.tolerances, given.clusters):
            row = {"model": given.model, "recipe": name, "tolerance": tolerance} | measured(pipe, call, way, samples, plain)
            row["kept"] = None if tolerance is None else sum(error <= tolerance for error in row["errors"]) / row["n"]
            rows.append(row)
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items() if key != "errors"}, flush=True)
        output.finish(rows, steps=given.steps, clusters=given.clusters)


if __name__ == "__main__":
    main()
