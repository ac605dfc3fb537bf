"""Every solver on a bundled model, at equal numbers of evaluations of the network.

    PYTHONPATH=. python benchmarks/samplers_solvers.py tiny-image [--evaluations 6 10 20] [--steps 50] [--prompts 8]

Heun's method looks twice a step, so it is given half the steps; PNDM once more than it has steps. A solver that a model has no
form of is a row that says why. Writes benchmarks/results/cpu-2core/samplers-solvers-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from resolutions import samples

from hasten.errors import HastenError
from hasten.pipelines.bench.candidates import Candidate, ours
from hasten.pipelines.bench.shots import Column, row_of, shoot
from hasten.pipelines.host import hardware
from hasten.pipelines.solver import scheduler_for
from hasten.pipelines.tiny_models import call_defaults, load
from hasten.recipe import Recipe
from hasten.report_forms import installed_versions
from hasten.samplers.solver import Solver

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-2core"
SOLVERS = {
    "euler": Solver(name="euler"), "heun": Solver(name="heun"), "ddim": Solver(name="ddim"), "pndm": Solver(name="pndm"),
    "dpm++, order 2": Solver(name="dpm++"), "dpm++, order 2, even times": Solver(name="dpm++", spacing="trailing"),
    "dpm++, order 3": Solver(name="dpm++", order=3), "unipc, order 2": Solver(name="unipc"),
    "unipc, order 3": Solver(name="unipc", order=3),
}  # fmt: skip


def steps_for(solver: Solver, evaluations: int) -> int:
    """Steps that take so many evaluations of each branch, or a few less: PNDM takes steps that divide a thousand."""
    whole = max(steps for steps in range(1, evaluations) if 1000 % steps == 0)
    return {"heun": (evaluations + 1) // 2, "pndm": whole}.get(solver.name, evaluations)


def compared(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each solver and number of evaluations, beside the model's own run of `--steps` and the converged one."""
    pipe, found = load(model), samples(model == "tiny-video", options.prompts, 1)
    pipe.set_progress_bar_config(disable=True)
    call = {**call_defaults(pipe), "num_inference_steps": options.steps}
    plain, columns, refused = Column(ours("plain", "plain")), list[Column](), list[dict[str, Any]]()
    for name, solver in SOLVERS.items():
        try:
            scheduler_for(pipe.scheduler, solver)
        except HastenError as error:
            refused.append({"model": model, "recipe": name, "control": None, "n": 0, "note": str(error)})
            continue
        for evaluations in options.evaluations:
            apply = ours(name, Recipe(name=name, sampler=solver)).apply
            columns.append(Column(Candidate(f"{name}, {evaluations}", apply, "", steps_for(solver, evaluations))))
    shoot(pipe, found[0], call | {"num_inference_steps": 3})
    for number, sample in enumerate(found):
        print(f"{model}: {number + 1} of {len(found)}", file=sys.stderr, flush=True)
        plain.shots.append(shoot(pipe, sample, call, plain.candidate))
        plain.plain_seconds.append(plain.shots[-1].seconds)
        for column in columns:
            column.shots.append(shoot(pipe, sample, call, column.candidate))
            column.plain_seconds.append(plain.shots[-1].seconds)
    plain.nfe = round(plain.shots[0].nfe or 0)
    exact = [shoot(pipe, sample, call | {"num_inference_steps": options.converged}).frames for sample in found]
    made = [row_of(model, plain, plain, found, exact)]
    for column in columns:
        name, _, evaluations = column.candidate.recipe.rpartition(", ")
        made.append(row_of(model, column, plain, found, exact) | {"recipe": name, "asked": int(evaluations), "steps": column.candidate.steps})
    return made + refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["tiny-image", "tiny-video"])
    parser.add_argument("--evaluations", type=int, nargs="+", default=[6, 10, 20])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--converged", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=8)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = compared(options.model, options)
    document = {"command": "samplers-solvers", "versions": installed_versions(), "hardware": hardware("cpu"), "steps": options.steps,
                "converged": options.converged, "rows": rows}  # fmt: skip
    file = RESULTS / f"samplers-solvers-{options.model}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
