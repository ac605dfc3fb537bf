"""Put a finished training among the bundled models: weights, card with checksums, thinned loss curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hasten.distill.data.moving_digits import load_digits
from hasten.distill.loop.state import replace_folder
from hasten.distill.pretrain.config import PretrainConfig
from hasten.errors import UsageError
from hasten.pipelines.tiny_models import sha256

MAX_POINTS = 200

PROMPTS = {
    "video": ["a seven moving left, slowly", "a three moving up, quickly", "a zero moving right, slowly"],
    "image": ["a seven", "a thick three at the top left", "a thin zero at the center"],
}


def bundle(
    config: PretrainConfig, out: Path, target: Path, *, source: str = "pipeline", data: str | None = None
) -> dict[str, Any]:
    """Copy `out/<source>` (a pipeline written by `pretrain`) to `target` and return its card.

    The card `hasten.json` holds the default call, licence, data, seed, steps and sha256 of each weight file;
    `loss.json` the loss curves of both trainings as at most 200 means. `data` names the handwriting used.
    """
    folder = Path(out) / source
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"No pipeline in '{folder}'. Finish the training first, or name source='latest'.")
    trained = json.loads((folder / "training.json").read_text())

    def write(part: Path) -> None:
        shutil.copytree(folder, part, dirs_exist_ok=True)
        (part / "training.json").unlink()
        forget_paths(part)
        for file in part.rglob("*.safetensors"):
            halve(file)
        (part / "loss.json").write_text(json.dumps(loss_curves(Path(out))) + "\n")
        card = _card(config, part, int(trained["step"]), load_digits(data).source if data else "unknown")
        (part / "hasten.json").write_text(json.dumps(card, indent=1) + "\n")

    replace_folder(Path(target), write)
    card: dict[str, Any] = json.loads((Path(target) / "hasten.json").read_text())
    return card


def halve(file: Path) -> None:
    """Store a file's weights in float16: half the size. Loaded as float32 images are 76 dB PSNR and more from the
    original's (`benchmarks/half_weights.py`)."""
    with safe_open(file, "pt") as stored:
        note = stored.metadata()
    save_file({name: value.half() for name, value in load_file(file).items()}, file, metadata=note)


def _card(config: PretrainConfig, folder: Path, steps: int, source: str) -> dict[str, Any]:
    weights = sorted(folder.rglob("*.safetensors"))
    return {
        "name": config.name,
        "kind": config.kind,
        "pipeline": json.loads((folder / "model_index.json").read_text())["_class_name"],
        "parameters": {file.parent.name: parameters(file) for file in weights},
        "call": dict(config.call),
        "prompts": PROMPTS[config.kind],
        "licence": "Apache-2.0",
        "data": source,
        "config": config.name,
        "settings": config.model_dump(mode="json", exclude={"name", "kind", "call"}),
        "seed": config.seed,
        "steps": {"vae": config.vae.steps if config.vae.weights is None else 0, "denoiser": steps},
        "torch": torch.__version__,
        "sha256": {str(file.relative_to(folder).as_posix()): sha256(file) for file in weights},
    }


def forget_paths(folder: Path) -> None:
    """Remove where the parts were loaded from: a path of the training machine means nothing elsewhere."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


def parameters(file: Path) -> int:
    """How many numbers a safetensors file holds, from its header alone."""
    from safetensors import safe_open

    total = 0
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            count = 1
            for size in tensors.get_slice(name).get_shape():
                count *= size
            total += count
    return total


def loss_curves(out: Path) -> dict[str, list[dict[str, float]]]:
    """Per training the loss as means over equal stretches of steps, at most `MAX_POINTS` of them."""
    curves: dict[str, list[dict[str, float]]] = {}
    for log in sorted(out.glob("checkpoints/*/log.jsonl")):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        width = max(1, -(-len(rows) // MAX_POINTS))
        parts = [rows[i : i + width] for i in range(0, len(rows), width)]
        curves[log.parent.name] = [
            {"step": part[-1]["step"], "loss": round(sum(row["loss"] for row in part) / len(part), 5)}
            for part in parts
        ]
    return curves
