"""Errors of every solver on a path that is known (`tests/gaussian.py`), and the order with which they fall.

    PYTHONPATH=. python benchmarks/samplers_orders.py

Even levels from all noise to share 0.15, the rest of the run left out. Writes benchmarks/results/cpu-2core/samplers-orders.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from hasten.pipelines.host import hardware
from hasten.pipelines.solver import scheduler_for
from hasten.report_forms import installed_versions
from hasten.samplers.solver import Solver
from tests.gaussian import error

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-2core" / "samplers-orders.json"
STEPS = (8, 16, 32, 64)
STOP = 0.15
HOSTS = {
    "flow matching": FlowMatchEulerDiscreteScheduler(),
    "variance preserving": DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
}
SOLVERS: list[tuple[Any, Any]] = [
    ("euler", None), ("ddim", None), ("heun", None), ("dpm++", 1), ("dpm++", 2), ("dpm++", 3), ("unipc", 1), ("unipc", 2), ("unipc", 3),
]  # fmt: skip


def main() -> None:
    rows = []
    for kind, host in HOSTS.items():
        for name, order in SOLVERS:
            if kind == "flow matching" and name == "ddim":
                continue
            errors = []
            for n in STEPS:
                times = (*(1 - (1 - STOP) * i / n for i in range(n + 1)), STOP * 0.6)
                made = scheduler_for(host, Solver(name=name, order=order, times=times))
                made.set_timesteps(1)
                errors.append(error(made, 2 * n if name == "heun" else n))
            slope = math.log(errors[-3] / errors[-1]) / math.log(STEPS[-1] / STEPS[-3])
            rows.append({"model": kind, "recipe": name, "order": order, "errors": dict(zip(map(str, STEPS), errors, strict=True)), "slope": slope})
            print(json.dumps(rows[-1]), flush=True)
    document = {"command": "samplers-orders", "versions": installed_versions(), "hardware": hardware("cpu"), "rows": rows}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
