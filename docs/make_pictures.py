"""Draws the sample grids of docs/tiny-models.md from the bundled models.

    python docs/make_pictures.py

One row per prompt: frames of the plain run on the left, of `balanced` with the same noise on the right (images: one
picture each). Prompts and seeds are fixed and none is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import hasten
from hasten.distill.moving_digits import clip_prompt, image_prompt
from hasten.pipelines import tiny_models

FOLDER = Path(__file__).resolve().parent / "images"
ZOOM, GAP = 2, 4
VIDEO_PROMPTS = [clip_prompt(digit, digit % 4, digit % 2) for digit in range(10)]
IMAGE_PROMPTS = [image_prompt(digit, digit % 5, digit % 2) for digit in range(10)]

Frames = NDArray[np.float64]


def sample(pipe: Any, prompt: str, seed: int, recipe: str) -> Frames:
    """Frames (F, H, W, 3) of one run; an image is one frame."""
    call = tiny_models.call_defaults(pipe)
    with hasten.accelerate(pipe, recipe):
        output = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **call)
    frames = output.frames[0] if hasattr(output, "frames") else output.images
    return np.asarray(frames, dtype=np.float64)


def strip(frames: Frames, num: int) -> Frames:
    """`num` frames side by side, evenly over the clip."""
    chosen = np.linspace(0, len(frames) - 1, min(num, len(frames))).round().astype(int)
    return np.concatenate([np.pad(frames[i], ((0, GAP), (0, GAP), (0, 0)), constant_values=0.25) for i in chosen], axis=1)


def grid(name: str, prompts: list[str], *, per_clip: int, columns: int) -> Image.Image:
    """All prompts of one model, plain beside balanced."""
    pipe = hasten.load(name)
    pipe.set_progress_bar_config(disable=True)
    cells = []
    for seed, prompt in enumerate(prompts):
        pair = [strip(sample(pipe, prompt, seed, recipe), per_clip) for recipe in ("plain", "balanced")]
        cells.append(np.concatenate([pair[0], np.ones((pair[0].shape[0], 2 * GAP, 3)), pair[1]], axis=1))
    space = np.ones((cells[0].shape[0], 4 * GAP, 3))
    rows = [np.concatenate([c for cell in cells[i : i + columns] for c in (cell, space)][:-1], axis=1)
            for i in range(0, len(cells), columns)]  # fmt: skip
    picture = (np.concatenate(rows).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(picture).resize((picture.shape[1] * ZOOM, picture.shape[0] * ZOOM), Image.Resampling.NEAREST)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    grid("tiny-video", VIDEO_PROMPTS, per_clip=5, columns=1).save(FOLDER / "tiny-video.png", optimize=True)
    grid("tiny-image", IMAGE_PROMPTS, per_clip=1, columns=5).save(FOLDER / "tiny-image.png", optimize=True)


if __name__ == "__main__":
    main()
