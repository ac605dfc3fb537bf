"""Digits written token by token: how many tokens a forward writes under speculative Jacobi decoding, and whether the digits stay.

    python benchmarks/token_images.py MODEL [--images 40] [--windows 8 16 32] [--noise fresh coupled same]

MODEL: a folder that `hasten train pretrain --config tiny-tokens` wrote. Every row draws from the model's own law, at temperature 1,
one image after the other; accuracy is the share of images in which the judge sees the digit that was asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from hasten.pipelines.decode_own.token_images import TokenImagePipeline
from hasten.pipelines.judge import Judge
from hasten.pipelines.recipes.decode_own import speculative_jacobi


def row(pipe: TokenImagePipeline, judge: Judge, images: int, name: str, recipe: Any) -> dict[str, Any]:
    """One recipe, by processor time, which other programs do not change."""
    right, forwards, tokens = 0, 0, 0
    begun = time.process_time()
    for number in range(images):
        found = pipe(number % 10, recipe=recipe, seed=number, output_type="pt")
        right += judge.read(found.images[0, 0][..., None].expand(-1, -1, 3)).digit == number % 10
        tokens += found.codes.numel() - 1
        forwards += found.codes.numel() - 1 if found.report is None else len(found.report.trace.rounds)
    return {
        "recipe": name, "images": images, "prompt_accuracy": round(right / images, 3),
        "tokens_per_forward": round(tokens / forwards, 3), "processor_seconds": round((time.process_time() - begun) / images, 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--noise", nargs="+", default=["fresh", "coupled", "same"])
    told = parser.parse_args()
    torch.set_num_threads(1)
    pipe, judge = TokenImagePipeline.from_pretrained(told.model), Judge.load()
    print(json.dumps(row(pipe, judge, told.images, "plain", None)), flush=True)
    for noise in told.noise:
        for window in told.windows:
            recipe = speculative_jacobi(window=window, row=pipe.row, noise=noise)
            print(json.dumps(row(pipe, judge, told.images, f"{noise}, window {window}", recipe)), flush=True)


if __name__ == "__main__":
    main()
