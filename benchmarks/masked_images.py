"""Masked images: what ReCAP saves and costs against computing everything, on a tiny-mask that was trained here.

    python benchmarks/masked_images.py FOLDER [--images 200] [--steps 16 24 32] [--guidance 1.0] [--sheet sheet.png]

FOLDER is what `hasten train pretrain --config tiny-mask` made. A row per number of steps and recipe: share of images in
which the judge reads the digit that was asked for, Frechet distance and recall against unseen real digits (their own, and
those of real digits put through the codebook, stand first), computed token-layers of an image, seconds of an image. Both
recipes have the same seeds. Writes `benchmarks/results/cpu-2core/masked_images.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hasten.pipelines.host import hardware
from hasten.pipelines.judge import Judge, frechet, recall
from hasten.pipelines.masked_images import MaskedImagePipeline, maskgit, recap
from hasten.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core" / "masked_images.json"
FIRST_SEED = 70_000


def generate(pipe: MaskedImagePipeline, recipe: Recipe, count: int, batch: int, scale: float) -> tuple[Tensor, dict[str, Any]]:
    """`count` images [n, S, S], all classes alike, each with its own seed; and what they cost."""
    parts, tokens, layers, began = [], 0, 0.0, time.perf_counter()
    for start in range(0, count, batch):
        numbers = range(start, min(start + batch, count))
        made = pipe(
            [number % pipe.words.classes for number in numbers], recipe=recipe, guidance_scale=scale, output_type="pt",
            generator=[torch.Generator().manual_seed(FIRST_SEED + number) for number in numbers],
        )  # fmt: skip
        parts.append(made.images[:, 0])
        tokens += int(made.tally.tokens.sum())
        layers += float(made.tally.layers.sum())
    calls = 1 if scale == 1 else 2
    cost = {
        "tokens": round(calls * tokens / count, 1),
        "token_layers": round(calls * layers / count, 1),
        "seconds": round((time.perf_counter() - began) / count, 4),
    }
    return torch.cat(parts), cost


def quality(images: Tensor, judge: Judge, real: Tensor, classes: int) -> dict[str, float]:
    """What the judge says of images [n, S, S] whose classes go round."""
    readings = judge.read_all(images[..., None].expand(-1, -1, -1, 3))
    fake = torch.stack([reading.features for reading in readings])
    right = sum(reading.digit == number % classes for number, reading in enumerate(readings))
    return {
        "digit_accuracy": round(right / len(images), 4),
        "frechet": round(frechet(real, fake), 3),
        "recall": round(recall(real, fake), 4),
    }


def references(stored: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The same numbers of real digits, as they are and through the codebook."""
    real = stored["features"]
    half = len(real) // 2
    rows = {"real digits (half against half)": (real[:half], real[half:]), "real digits, coded": (real, stored["features.coded"])}
    return [
        {"name": name, "n": len(b), "frechet": round(frechet(a, b), 3), "recall": round(recall(a, b), 4)}
        for name, (a, b) in rows.items()
    ]


def sheet(rows: list[Tensor], per: int = 20, scale: int = 2) -> Image.Image:
    """One line of images for each row of the table."""
    lines = [torch.nn.functional.pad(images[:per], (1, 1, 1, 1), value=0.35).transpose(0, 1).flatten(1) for images in rows]
    picture = Image.fromarray((torch.cat(lines).clamp(0, 1) * 255).round().byte().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 24, 32])
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=4.5, help="temperature of the order of slots")
    parser.add_argument("--sheet", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    pipe, judge = MaskedImagePipeline.from_pretrained(options.folder), Judge.load()
    stored = load_file(options.folder / "reference.safetensors")
    rows, shown = references(stored), []
    for row in rows:
        print(json.dumps(row), flush=True)
    for steps in options.steps:
        for name, recipe in (("maskgit", maskgit(steps, options.noise)), ("recap", recap(steps, options.noise))):
            images, cost = generate(pipe, recipe, options.images, options.batch, options.guidance)
            said = quality(images, judge, stored["features"], pipe.words.classes)
            rows.append({"name": name, "steps": steps, "n": options.images, **said, **cost})
            shown.append(images)
            print(json.dumps(rows[-1]), flush=True)
    if options.sheet is not None:
        sheet(shown).save(options.sheet, optimize=True)
    document = {
        "command": "masked_images",
        "guidance": options.guidance,
        "noise": options.noise,
        "batch": options.batch,
        "steps_trained": json.loads((options.folder / "training.json").read_text())["step"],
        "versions": {"torch": torch.__version__},
        "hardware": hardware("cpu"),
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
