"""How good the bundled tiny models are on their own: what the judge reads from plain runs of unseen seeds.

    python benchmarks/tiny_models.py [--models tiny-video tiny-image tiny-flux] [--seeds 64] [--images docs/images]

Writes `benchmarks/results/cpu-2core/tiny_models.json` (rows with prompt accuracy per attribute, Frechet distance
and recall against unseen real clips, seconds a run) and one grid of samples per model. The Frechet distance of as
many real clips is given beside it: with 64 samples it is far from zero even for reality.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hasten.pipelines import tiny_models
from hasten.pipelines.host import hardware
from hasten.pipelines.judge import DIGITS, DIRECTIONS, SPEEDS, Judge, frechet, precision, recall

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core" / "tiny_models.json"
PLACES = ("top left", "top right", "bottom left", "bottom right", "center")
FIRST_SEED = 50_000
"""Seeds of the initial noise; training drew its noise from hashed seeds of its own."""


def prompts(kind: str, count: int) -> list[str]:
    """Evenly over digits, directions and speeds (or strokes and places)."""
    if kind == "video":
        return [f"a {DIGITS[i % 10]} moving {DIRECTIONS[i % 4]}, {SPEEDS[i // 4 % 2]}" for i in range(count)]
    return [
        f"a {('thin', 'thick')[i // 5 % 2]} {DIGITS[i % 10]} at the {PLACES[i % 5]}" for i in range(count)
    ]


def generate(name: str, told: Sequence[str], batch: int) -> tuple[list[np.ndarray], list[float]]:
    """The plain run of each prompt with its own seed: clips (F, H, W, 3) or images, and seconds per prompt."""
    pipe = tiny_models.load(name)
    pipe.set_progress_bar_config(disable=True)
    call = tiny_models.call_defaults(name)
    made: list[np.ndarray] = []
    seconds: list[float] = []
    for start in range(0, len(told), batch):
        part = list(told[start : start + batch])
        seeds = [torch.Generator().manual_seed(FIRST_SEED + start + i) for i in range(len(part))]
        began = time.perf_counter()
        result = pipe(part, generator=seeds, output_type="np", **call)
        seconds += [(time.perf_counter() - began) / len(part)] * len(part)
        made += list(result.frames if hasattr(result, "frames") else result.images)
        print(f"{name}: {len(made)}/{len(told)}, {seconds[-1]:.1f} s each", flush=True)
    return made, seconds


def measure(name: str, count: int, batch: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """One result row and the generated pictures."""
    card, judge = tiny_models.card(name), Judge.load()
    kind = card["kind"]
    told = prompts(kind, count)
    made, seconds = generate(name, told, batch)
    readings = judge.read_all(made)
    scores = judge.prompt_accuracy(made, told)
    fake, real = torch.stack([r.features for r in readings]), judge.reference_features(kind)
    row = {
        "model": name,
        "recipe": "none",
        "n": count,
        "steps_trained": card["steps"]["denoiser"],
        "nfe": card["call"]["num_inference_steps"] * 2,
        "seconds": round(statistics.median(seconds), 3),
        "prompt_accuracy": round(scores["all"], 4),
        **{
            f"{key}_accuracy": round(scores[key], 4)
            for key in ("digit", "direction", "speed")
            if key in scores
        },
        "frechet": round(judge.frechet_to_real(fake, kind), 3),
        "frechet_of_as_many_real": round(frechet(real[:count], real[count:]), 3),
        "recall": round(recall(real, fake), 4),
        "recall_of_as_many_real": round(recall(real[count:], real[:count]), 4),
        "precision": round(precision(real, fake), 4),
    }
    return row, made


def grid(pictures: Sequence[np.ndarray], columns: int = 4, rows: int = 8, scale: int = 2) -> Image.Image:
    """Clips as strips of every fourth frame, images as tiles; nearest-neighbour enlarged."""
    clips = pictures[0].ndim == 4
    tiles = [np.concatenate(list(p[::4]), axis=1) if clips else p for p in pictures]
    columns = columns if clips else 2 * columns
    tiles = [np.pad(tile, ((0, 2), (0, 4), (0, 0)), constant_values=0.35) for tile in tiles[: columns * rows]]
    lines = [
        np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles) - columns + 1, columns)
    ]
    canvas = Image.fromarray((np.concatenate(lines) * 255).round().astype(np.uint8)).convert("L")
    return canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny-video", "tiny-image", "tiny-flux"])
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument(
        "--batch", type=int, default=8, help="prompts per call; 1 gives the time of a single run"
    )
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        row, made = measure(name, options.seeds, options.batch)
        rows.append(row)
        print(json.dumps(row))
        options.images.mkdir(parents=True, exist_ok=True)
        grid(made).save(options.images / f"{name}.png", optimize=True)
    earlier = json.loads(options.json.read_text())["rows"] if options.json.is_file() else []
    rows = [row for row in earlier if row["model"] not in options.models] + rows
    document = {
        "command": "tiny_models",
        "versions": {"torch": torch.__version__},
        "hardware": hardware("cpu"),
        "judge": Judge.load().card["accuracy"],
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
