"""What it costs to be watched: a step with nothing enabled against a step without hasten."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from hasten.pipelines.accelerate import accelerate


def bench_overhead(pipe: Any, call: dict[str, Any], *, repeats: int = 9, steps: int = 6, prompt: str = "a") -> dict[str, Any]:
    """One row: median over `repeats` pairs of neighbouring runs, in alternating order, of time watched over time plain.

    Only the denoising loop is timed (latents out, no decoding). `identical`: every pair is bit-equal.
    """
    arguments = {**call, "num_inference_steps": steps, "output_type": "latent", "return_dict": False}

    def once() -> tuple[float, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        began = time.perf_counter()
        latents = pipe(prompt=prompt, generator=generator, **arguments)[0]
        return time.perf_counter() - began, torch.as_tensor(latents)

    def watched() -> tuple[float, torch.Tensor]:
        with accelerate(pipe, "plain"):
            return once()

    once()
    watched()
    ratios, identical, plain_seconds = [], True, []
    for number in range(repeats):
        (a, x), (b, y) = (once(), watched()) if number % 2 == 0 else (watched(), once())[::-1]
        identical &= torch.equal(x, y)
        plain_seconds.append(a / steps)
        ratios.append(b / a)
    return {
        "recipe": "plain",
        "n": repeats,
        "seconds": statistics.median(plain_seconds),
        "overhead": statistics.median(ratios) - 1,
        "overhead_worst": max(ratios) - 1,
        "identical": identical,
    }
