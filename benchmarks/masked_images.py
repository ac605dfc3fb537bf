"""Masked images: what ReCAP saves and costs against computing everything, on tiny-mask.

    python benchmarks/masked_images.py [MODEL] [--images 200] [--steps 16 24 32] [--guidance 2.5] [--sheet sheet.png]

MODEL is the bundled model or what `hasten train pretrain --config tiny-mask` made. Rows of each number of steps: maskgit;
recap-tokens (half of the steps compute everything, one local step a group); and as a control maskgit in as many steps as
cost what that costs. A row says in how many images the judge reads the digit that was asked for, the Frechet distance and
recall against unseen real digits (their own, and those of real digits put through the codebook, stand first), of ReCAP the
share of codes that are those of maskgit, and the work. All rows have the same seeds, but for the last: maskgit again with
others.
Writes `benchmarks/results/cpu-2core/masked-images.json` anew after each row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hasten.atomic import atomic_write
from hasten.pipelines import tiny_models
from hasten.pipelines.host import hardware
from hasten.pipelines.judge import Judge, frechet, recall
from hasten.pipelines.masked_images import MaskedImagePipeline
from hasten.pipelines.recipes import recipe as find_recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core" / "masked-images.json"
FIRST_SEED = 70_000
"""Guidance and temperatures were chosen on seeds from 10,000."""

Row = dict[str, Any]


class Bench:
    """A pipeline under measurement. images: how many for each row, all classes alike, each with its own seed."""

    def __init__(self, pipe: MaskedImagePipeline, real: Tensor, images: int, batch: int, guidance: float, temperature: float):
        self.pipe, self.real, self.images, self.batch = pipe, real, images, batch
        self.guidance, self.temperature = guidance, temperature
        self.judge = Judge.load()

    def row(self, recipe: str, seed: int = FIRST_SEED) -> tuple[Row, Tensor]:
        """What a recipe's images are worth, and what they cost; and their codes, int64 [n, L]."""
        parts, tokens, layers, began = [], 0, 0.0, time.perf_counter()
        for start in range(0, self.images, self.batch):
            numbers = range(start, min(start + self.batch, self.images))
            made = self.pipe(
                [number % self.pipe.words.classes for number in numbers], recipe=find_recipe(recipe),
                guidance_scale=self.guidance, temperature=self.temperature, output_type="pt",
                generator=[torch.Generator().manual_seed(seed + number) for number in numbers],
            )  # fmt: skip
            parts.append(made.codes)
            tokens += int(made.tally.tokens.sum())
            layers += float(made.tally.layers.sum())
        seconds, codes = time.perf_counter() - began, torch.cat(parts)
        branches = 1 if self.guidance == 1 else 2
        cost = {
            "token_forwards": round(branches * tokens / self.images, 1),
            "token_layers": round(branches * layers / self.images, 1),
            "seconds": round(seconds / self.images, 4),
        }
        return {"recipe": recipe, "n": self.images, **self._quality(codes), **cost}, codes

    def _quality(self, codes: Tensor) -> Row:
        images = self.pipe.codebook.decode(codes)
        readings = self.judge.read_all(images[..., None].expand(-1, -1, -1, 3))
        fake = torch.stack([reading.features for reading in readings])
        right = sum(reading.digit == number % self.pipe.words.classes for number, reading in enumerate(readings))
        return {"prompt_accuracy": round(right / len(images), 4), **distances(self.real, fake)}

    def rows(self, steps: Sequence[int]) -> Iterator[tuple[Row, Tensor]]:
        """All rows: first both recipes at each number of steps, then what they are compared with."""
        fewer: list[tuple[int, int]] = []
        for number in steps:
            plain, base = self.row(f"maskgit:steps={number}")
            yield {"steps": number, **plain}, base
            row, codes = self.row(f"recap-tokens:steps={number}")
            share = row["token_layers"] / plain["token_layers"]
            agreement = round(float((codes == base).float().mean()), 4)
            fewer.append((number, round(number * share)))
            yield {"steps": number, **row, "computed_fraction": round(share, 4), "agreement": agreement}, codes
        for number, as_many in fewer:
            row, codes = self.row(f"maskgit:steps={as_many}")
            yield {"steps": number, **row, "control": "fewer_steps", "computed_fraction": round(as_many / number, 4)}, codes
        row, codes = self.row(f"maskgit:steps={steps[0]}", FIRST_SEED + 10 * self.images)
        yield {"steps": steps[0], **row, "control": "other_seed"}, codes


def distances(real: Tensor, fake: Tensor) -> Row:
    """Frechet distance and recall of features [n, 48]."""
    return {"frechet": round(frechet(real, fake), 3), "recall": round(recall(real, fake), 4)}


def references(stored: dict[str, Tensor]) -> list[Row]:
    """The same numbers of real digits, as they are and through the codebook."""
    real = stored["features"]
    half = len(real) // 2
    rows = {"real digits, half against half": (real[:half], real[half:]), "real digits, coded": (real, stored["features.coded"])}
    return [{"recipe": name, "control": "real", "n": len(b), **distances(a, b)} for name, (a, b) in rows.items()]


def sheet(rows: list[Tensor], per: int = 20, scale: int = 2) -> Image.Image:
    """One line of images for each row of the table."""
    lines = [torch.nn.functional.pad(images[:per], (1, 1, 1, 1), value=0.35).transpose(0, 1).flatten(1) for images in rows]
    picture = Image.fromarray((torch.cat(lines).clamp(0, 1) * 255).round().byte().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-mask")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 24, 32])
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the tokens")
    parser.add_argument("--sheet", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = tiny_models.path(options.model) if options.model in tiny_models.names() else Path(options.model)
    stored = load_file(folder / "reference.safetensors")
    pipe = MaskedImagePipeline.from_pretrained(folder)
    bench = Bench(pipe, stored["features"], options.images, options.batch, options.guidance, options.temperature)
    document: Row = {
        "command": "masked-images", "guidance": options.guidance, "temperature": options.temperature,
        "batch": options.batch, "versions": {"torch": torch.__version__}, "hardware": hardware("cpu"),
    }  # fmt: skip
    rows, shown = references(stored), []
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for row, codes in bench.rows(options.steps):
        rows.append({"model": options.model, **row})
        shown.append(pipe.codebook.decode(codes))
        print(json.dumps(rows[-1]), flush=True)
        atomic_write(options.json, json.dumps(document | {"rows": rows}, indent=1) + "\n")
        if options.sheet is not None:
            sheet(shown).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
