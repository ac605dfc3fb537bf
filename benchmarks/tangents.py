"""How rough bundled models are in time: their exact tangents against differences, along their own trajectories.

    python benchmarks/tangents.py [--models tiny-image tiny-flux] [--rows 8] [--json FILE]

At points between noise and samples of the model itself (its own few-step solver), in float32, dF / dtau along the model's
velocity: root mean square of the exact tangent (`torch.func.jvp`), and of differences over 1e-4 to 0.05 radians to either
side, with how far each is from the exact one. Where a trajectory is straight, dF / dtau is -x, whose size is about 1. The
choice of `tangent` in the methods scm and meanflow rests on this table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hasten.distill.network.few_steps import FewSteps, sample
from hasten.distill.network.host_call import learn
from hasten.distill.network.jvp import tangent
from hasten.distill.network.paths import turned
from hasten.distill.network.roles import Role
from hasten.pipelines import tiny_models

ANGLES = (0.2, 0.6, 1.0, 1.3, 1.45)
WIDTHS = (1e-4, 1e-3, 1e-2, 5e-2)


def size(value: Tensor) -> float:
    """Root mean square."""
    return float(value.square().mean().sqrt())


def rows_of(name: str, rows: int) -> list[dict[str, Any]]:
    """A row of numbers for each angle."""
    pipe = DiffusionPipeline.from_pretrained(tiny_models.path(name), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in tiny_models.call_defaults(pipe).items() if k != "num_inference_steps"}
    host, condition = learn(pipe.to(torch.float32), [f"a {word}" for word in ("two", "seven", "nine", "one")], **call)
    condition = condition.rows(torch.arange(rows) % len(condition))
    role = Role("teacher", host, None, (), False)
    z = torch.randn(rows, *host.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x0 = sample(role, z, condition, FewSteps.even(12, host.path, "ode"))
    found = []
    for angle in ANGLES:
        tau = torch.full((rows,), angle, dtype=torch.float64)
        x, one = turned(x0, -z, tau), torch.ones_like(tau)
        with torch.no_grad():
            velocity = role.velocity(x, tau, condition)
        _, exact = tangent(role, x, tau, condition, velocity, one)
        row: dict[str, Any] = {"model": name, "tau": angle, "x": size(x), "F": size(velocity), "exact": size(exact)}
        for width in WIDTHS:
            _, near = tangent(role, x, tau, condition, velocity, one, width)
            row |= {f"{width:g}": size(near), f"{width:g} off": size(near - exact)}
        found.append(row)
        print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
    return found


def main() -> None:
    """Print the table; write it where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-image", "tiny-video", "tiny-flux"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [row for name in given.models for row in rows_of(name, given.rows)]
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
