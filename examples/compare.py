"""Recipes next to the plain run: how much was computed, how long it took, how close the result is.

    python examples/compare.py [RECIPE ...]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

import hasten
from hasten import metrics
from hasten.pipelines import tiny_models


def main(recipes: list[str], steps: int = 50) -> list[dict[str, Any]]:
    pipe = hasten.load("tiny-video")
    pipe.set_progress_bar_config(disable=True)
    call = tiny_models.call_defaults("tiny-video") | {"num_inference_steps": steps}

    def generate() -> tuple[Any, float]:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        video = pipe("a two moving up, quickly", generator=generator, output_type="np", **call).frames[0]
        return video, time.perf_counter() - began

    generate()  # warm-up
    plain, plain_seconds = generate()
    rows = []
    for name in recipes:
        with hasten.accelerate(pipe, name) as run:
            video, seconds = generate()
        report = run.report()
        rows.append({"recipe": name, "nfe": report.nfe, "psnr": metrics.psnr(plain, video)})
        print(
            f"{name:18} {report.nfe:5.1f} of {report.evaluations} evaluations"
            f"  {plain_seconds / seconds:4.1f}x  {rows[-1]['psnr']:5.1f} dB"
        )
    return rows


if __name__ == "__main__":
    main(sys.argv[1:] or ["plain", "balanced", "fast", "easycache", "every-other", "fewer-steps"])
