"""What storing weights in float16 costs: pictures of the bundled models against those of their float32 originals.

    python benchmarks/half_weights.py [--models tiny-video ...] [--count 8] [--originals FOLDER | REVISION]

A row per model: every weight file of it that is stored in float16 is replaced by the float32 file that it was made from,
and both make the same pictures (the default call, the same noise). The originals are read from `FOLDER/NAME/...`, from a
revision of this repository, or, where nothing is said, from the last revision in which the file was float32. Prints PSNR
in dB, each picture's and the smallest, and the largest relative rounding error of a weight; writes
`benchmarks/results/cpu-2core/half_weights.json`, from which the numbers in docs/tiny-models.md are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load, load_file

from hasten import metrics
from hasten.cli.bench import own_prompts
from hasten.pipelines import tiny_models
from hasten.pipelines.host import hardware

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core" / "half_weights.json"
FIRST_SEED = 60_000
SMALLEST_NORMAL = 2.0**-14
"""Below it float16 has fewer than 11 bits; the relative error says nothing there."""


def git(*arguments: str) -> bytes:
    """What a git command of this repository prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def is_float32(stored: bytes) -> bool:
    return all(value.dtype == torch.float32 for value in load(stored).values())


def original(file: Path, name: str, where: str | None) -> bytes:
    """The float32 file that `file` (a path below the folder of the bundled model `name`) was made from."""
    if where is not None and Path(where).is_dir():
        return (Path(where) / name / file).read_bytes()
    path = (tiny_models.path(name) / file).resolve().relative_to(ROOT).as_posix()
    revisions = [where] if where is not None else git("log", "--format=%H", "--", path).decode().split()
    for revision in revisions:
        stored = git("show", f"{revision}:{path}")
        if is_float32(stored):
            return stored
    raise SystemExit(f"{path} was float32 in none of {', '.join(revisions)}. Name the folder or the revision that has it.")


def halved(name: str) -> list[Path]:
    """The weight files of a bundled model that are stored in float16, below its folder."""
    folder = tiny_models.path(name)
    files = sorted(folder.rglob("*.safetensors"))
    return [file.relative_to(folder) for file in files if {v.dtype for v in load_file(file).values()} == {torch.float16}]


def rounding(name: str, file: Path, before: bytes) -> float:
    """The largest relative error of a weight; of those that are too small for it, the largest one against the limit."""
    now, was = load_file(tiny_models.path(name) / file), load(before)
    assert now.keys() == was.keys()
    return max(float(((now[k].float() - was[k]).abs() / was[k].abs().clamp(min=SMALLEST_NORMAL)).max()) for k in was)


def pictures(folder: Path, name: str, count: int) -> list[np.ndarray]:
    """`count` clips or images of the pipeline in `folder`, in float32, each with noise of its own."""
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert all(p.dtype == torch.float32 for p in pipe.transformer.parameters())
    pipe.set_progress_bar_config(disable=True)
    made = []
    for number, prompt in enumerate(own_prompts(tiny_models.card(name)["kind"] == "video")[:count]):
        noise = torch.Generator().manual_seed(FIRST_SEED + number)
        result = pipe(prompt, generator=noise, output_type="np", **tiny_models.call_defaults(name))
        made.append(result.frames[0] if hasattr(result, "frames") else result.images[0])
        print(f"{name}: {number + 1}/{count}", flush=True)
    return made


def measure(name: str, count: int, where: str | None) -> dict[str, Any]:
    """One result row."""
    files = {file: original(file, name, where) for file in halved(name)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        shutil.copytree(tiny_models.path(name), folder)
        for file, stored in files.items():
            (folder / file).write_bytes(stored)
        pairs = zip(pictures(folder, name, count), pictures(tiny_models.path(name), name, count), strict=True)
        each = [round(metrics.psnr(now, was), 1) for was, now in pairs]
    return {
        "model": name,
        "files": [file.as_posix() for file in files],
        "n": count,
        "bytes_float32": sum(map(len, files.values())),
        "bytes": sum((tiny_models.path(name) / file).stat().st_size for file in files),
        "largest_rounding_error": max(rounding(name, file, stored) for file, stored in files.items()),
        "psnr": each,
        "psnr_worst": min(each),
        "psnr_median": round(statistics.median(each), 1),
    }


def written(file: Path, row: dict[str, Any]) -> None:
    """Put a row in the place of the earlier one of the same model."""
    earlier = json.loads(file.read_text())["rows"] if file.is_file() else []
    document = {
        "command": "half_weights",
        "versions": {"torch": torch.__version__},
        "hardware": hardware("cpu"),
        "rows": [one for one in earlier if one["model"] != row["model"]] + [row],
    }
    file.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny-image", "tiny-flux", "tiny-video"])
    parser.add_argument("--count", type=int, default=8, help="pictures per model")
    parser.add_argument("--originals", help="a folder with one folder per model, or a revision of this repository")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.models:
        row = measure(name, options.count, options.originals)
        print(json.dumps(row), flush=True)
        written(options.json, row)


if __name__ == "__main__":
    main()
