"""Digits written token by token: how many tokens a forward writes under speculative Jacobi decoding, what it saves, and whether
the digits stay.

    python benchmarks/token_images.py [MODEL] [--images 200] [--timed 20] [--windows 6 16] [--noise fresh coupled same] [--sheet FILE]

MODEL: the bundled one, or a folder that `hasten train pretrain --config tiny-tokens` wrote. Every row draws from the model's own law,
at temperature 1; the plain row with other seeds says by how much numbers differ that have the same law. All images of a row are one
batch, and tokens per forward are counted for each image, the forward that reads the class included. Times are those of further images,
drawn one at a time, each by all rows in turn, so that they have the same machine. Accuracy is the share of images in which the judge
sees the digit that was asked for, Frechet distance and recall are to unseen real digits, beside those of as many real digits put
through the codebook. Intervals are of 95 %: of shares Clopper's and Pearson's, else 1.96 standard errors of the mean.
Writes `benchmarks/results/cpu-2core/token-images.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hasten.atomic import atomic_write
from hasten.pipelines import tiny_models
from hasten.pipelines.decode_own.token_images import TokenImagePipeline
from hasten.pipelines.host import hardware
from hasten.pipelines.judge import Judge, frechet, recall
from hasten.pipelines.recipes.decode_own import speculative_jacobi
from hasten.pipelines.tune.text_goal import interval
from hasten.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core" / "token-images.json"
FIRST_SEED = 80_000
REAL = "tiny-mask"
"""Whose unseen real digits are compared with: both models learned from the same ones, with the same codebook."""


@dataclass(slots=True)
class Line:
    """One row in the making. recipe: None writes token by token. seed: of the batch. codes int64 [n, L]."""

    name: str
    recipe: Recipe | None = None
    seed: int = FIRST_SEED
    facts: dict[str, Any] = field(default_factory=dict)
    codes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    per_forward: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def draw(self, pipe: TokenImagePipeline, images: int) -> None:
        """All images, and how many tokens each gained by a forward."""
        made = pipe([number % 10 for number in range(images)], recipe=self.recipe, seed=self.seed, output_type="pt")
        self.codes, slots = made.codes, made.codes.shape[1]
        rounds = [] if made.report is None else [each.written for each in made.report.rounds]
        self.per_forward = [slots / number for number in (forwards(rounds, images, slots) if rounds else [slots] * images)]

    def time(self, pipe: TokenImagePipeline, number: int) -> None:
        """One image, alone."""
        wall, processor = time.perf_counter(), time.process_time()
        pipe(number % 10, recipe=self.recipe, seed=number, output_type="pt")
        self.processor.append(time.process_time() - processor)
        self.seconds.append(time.perf_counter() - wall)

    def row(self, pipe: TokenImagePipeline, judge: Judge, real: Tensor, plain: Line) -> dict[str, Any]:
        """As it stands in the result file."""
        images, n = pipe.codebook.decode(self.codes), len(self.codes)
        readings = judge.read_all(images[..., None].expand(-1, -1, -1, 3))
        right = sum(reading.digit == number % 10 for number, reading in enumerate(readings))
        return {
            "recipe": self.name, "n": n, **self.facts,
            "tokens_per_forward": statistics.fmean(self.per_forward), "tokens_per_forward_interval": around(self.per_forward),
            "timed": len(self.seconds), "processor_seconds": statistics.fmean(self.processor), "seconds": statistics.median(self.seconds),
            **ratios("speedup", plain.processor, self.processor), **ratios("speedup_wall", plain.seconds, self.seconds),
            "prompt_accuracy": right / n, "prompt_accuracy_interval": interval(right, n),
            **distances(real, torch.stack([reading.features for reading in readings])),
        }  # fmt: skip


def forwards(rounds: Sequence[Sequence[int]], images: int, slots: int) -> list[int]:
    """Of each image, the one that reads its class included. rounds: tokens that each image gained that was not finished."""
    left, found = [slots - 1] * images, [1] * images
    for gained in rounds:
        active = [row for row in range(images) if left[row]]
        for row, tokens in zip(active, gained, strict=True):
            left[row] -= tokens
            found[row] += 1
    assert not any(left), "every image has all its tokens"
    return found


def around(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean."""
    mean = statistics.fmean(values)
    reach = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return mean - reach, mean + reach


def ratios(name: str, plain: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """How many times as fast, by means, with its interval: of ours to plain image by image (delta method)."""
    top, bottom = statistics.fmean(plain), statistics.fmean(ours)
    ratio = top / bottom
    reach = 1.96 * statistics.stdev([a - ratio * b for a, b in zip(plain, ours, strict=True)]) / math.sqrt(len(ours)) / bottom
    return {name: ratio, f"{name}_interval": (ratio - reach, ratio + reach)}


def distances(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Frechet distance and recall of features [n, 48]."""
    return {"frechet": frechet(real, fake), "recall": recall(real, fake)}


def lines(pipe: TokenImagePipeline, windows: Sequence[int], noises: Sequence[str]) -> list[Line]:
    """Plain, each noise with each window, and plain with other seeds."""
    made = [Line("plain")]
    for noise in noises:
        for window in windows:
            recipe = speculative_jacobi(window=window, row=pipe.row, noise=noise)
            made.append(Line("speculative-jacobi", recipe, facts={"noise": noise, "window": window}))
    return [*made, Line("plain", seed=FIRST_SEED + 1, facts={"control": "other_seed"})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-tokens")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--timed", type=int, default=20, help="images for the times")
    parser.add_argument("--windows", type=int, nargs="+", default=[6, 16])
    parser.add_argument("--noise", nargs="+", default=["fresh", "coupled", "same"])
    parser.add_argument("--sheet", type=Path, default=None, help="a picture of the first images of each kind of row")
    parser.add_argument("--json", type=Path, default=RESULTS)
    told = parser.parse_args()
    torch.set_num_threads(1)
    pipe, judge = TokenImagePipeline.from_pretrained(told.model), Judge.load()
    stored = load_file(tiny_models.path(REAL) / "reference.safetensors")
    real, coded = stored["features"], stored["features.coded"]
    rows = lines(pipe, told.windows, told.noise)
    for line in rows:
        line.draw(pipe, told.images)
        print(f"{line.name} {line.facts}: {statistics.fmean(line.per_forward):.2f} tokens per forward", flush=True)
    for number in range(told.timed):  # everything is warm by now
        for line in rows:
            line.time(pipe, number)
    found = [{"recipe": "real digits, coded", "control": "real", "n": told.images, **distances(real, coded[: told.images])}]
    found += [{"model": told.model, **line.row(pipe, judge, real, rows[0])} for line in rows]
    for row in found:
        print(json.dumps(rounded(row)))
    document = {
        "command": "token-images", "temperature": 1.0, "versions": {"torch": torch.__version__}, "hardware": hardware("cpu"),
        "rows": [rounded(row) for row in found],
    }  # fmt: skip
    told.json.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(told.json, json.dumps(document, indent=1) + "\n")
    if told.sheet is not None:
        save_sheet(pipe, [rows[0], *(line for line in rows if line.facts.get("window") == told.windows[0])], told.sheet)


def rounded(value: Any) -> Any:
    """Four digits behind the point, in all that a row holds."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def save_sheet(pipe: TokenImagePipeline, shown: Sequence[Line], file: Path) -> None:
    """One line of twenty images for each row."""
    from masked_images import sheet

    sheet([pipe.codebook.decode(line.codes[:20]) for line in shown]).save(file, optimize=True)


if __name__ == "__main__":
    main()
