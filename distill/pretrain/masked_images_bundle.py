"""Put a finished training of a model of images as tokens among the bundled models: weights, codebook, card, loss curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from hasten.distill.data.moving_digits import load_digits
from hasten.distill.loop.state import replace_folder
from hasten.distill.pretrain.bundle import loss_curves, parameters
from hasten.distill.pretrain.config import parse_as
from hasten.distill.pretrain.masked_images_config import MaskedImageConfig
from hasten.errors import UsageError
from hasten.pipelines.judge import DIGITS
from hasten.pipelines.tiny_models import sha256


def bundle_masked(
    out: Path, target: Path, *, data: str, guidance_scale: float = 2.5, source: str = "model"
) -> dict[str, Any]:
    """Copy `out/<source>` (written by `pretrain_masked`) to `target` with its card and loss curve; the card.

    data: the handwriting that it learned, as for `pretrain_masked`; the card names where it is from. guidance_scale: of an
    ordinary call; image tokens have none, and no reference of their own: that of tiny-mask is of the same unseen digits.
    source: "latest" takes the last checkpoint of a training that is not finished. `UsageError` if it is not there.
    """
    folder = Path(out) / source
    if not (folder / "training.json").is_file():
        raise UsageError(f"No model in '{folder}'. Finish the training first, or name source='latest'.")
    steps = int(json.loads((folder / "training.json").read_text())["step"])

    def write(part: Path) -> None:
        shutil.copytree(folder, part, dirs_exist_ok=True)
        (part / "training.json").unlink()
        if json.loads((Path(out) / "config.json").read_text())["kind"] == "image-tokens":
            (part / "reference.safetensors").unlink()
        (part / "loss.json").write_text(json.dumps(loss_curves(Path(out))) + "\n")
        card = _card(part, Path(out), steps, load_digits(data).source, guidance_scale)
        (part / "hasten.json").write_text(json.dumps(card, indent=1) + "\n")

    replace_folder(Path(target), write)
    card: dict[str, Any] = json.loads((Path(target) / "hasten.json").read_text())
    return card


def _card(folder: Path, out: Path, steps: int, source: str, guidance_scale: float) -> dict[str, Any]:
    raw = json.loads((out / "config.json").read_text())
    raw.pop("source")
    config = parse_as(MaskedImageConfig, raw, str(out / "config.json"))
    weights = sorted(folder.glob("*.safetensors"))
    return {
        "name": config.name,
        "kind": config.kind,
        "class": json.loads((folder / "config.json").read_text())["architectures"][0],
        "parameters": {"model": parameters(folder / "model.safetensors")},
        "call": {} if config.kind == "image-tokens" else {"guidance_scale": guidance_scale},
        "prompts": list(DIGITS),
        "licence": "Apache-2.0",
        "data": source,
        "config": config.name,
        "settings": config.model_dump(mode="json", exclude={"name", "kind"}),
        "seed": config.seed,
        "steps": {"image": steps},
        "torch": torch.__version__,
        "sha256": {file.name: sha256(file) for file in weights},
    }
