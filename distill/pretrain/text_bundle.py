"""Put a finished text training among the bundled models: weights, tokenizer, card with checksums, loss curve."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from hasten.distill.loop.state import replace_folder
from hasten.distill.pretrain.bundle import loss_curves, parameters
from hasten.distill.pretrain.config import parse_as
from hasten.distill.pretrain.text_config import TextPretrainConfig
from hasten.errors import UsageError
from hasten.pipelines.list_tasks import TASKS, questions
from hasten.pipelines.tiny_models import sha256

LICENCE = "Apache-2.0"


def bundle_text(out: Path, target: Path, *, source: str = "model") -> dict[str, Any]:
    """Copy `out/<source>` (written by `pretrain_text`) to `target` with its card and loss curve; the card.

    `source="latest"` takes the last checkpoint of a training that is not finished. `UsageError` if it is not there.
    The card's settings are those that `out` was trained with.
    """
    folder = Path(out) / source
    if not (folder / "training.json").is_file():
        raise UsageError(f"No model in '{folder}'. Finish the training first, or name source='latest'.")
    step = int(json.loads((folder / "training.json").read_text())["step"])

    def write(part: Path) -> None:
        shutil.copytree(folder, part, dirs_exist_ok=True)
        (part / "training.json").unlink()
        (part / "loss.json").write_text(json.dumps(loss_curves(Path(out))) + "\n")
        card = _card(part, Path(out), step)
        (part / "hasten.json").write_text(json.dumps(card, indent=1) + "\n")

    replace_folder(Path(target), write)
    card: dict[str, Any] = json.loads((Path(target) / "hasten.json").read_text())
    return card


def _card(folder: Path, out: Path, step: int) -> dict[str, Any]:
    raw = json.loads((out / "config.json").read_text())
    tokenizer, _ = raw.pop("tokenizer"), raw.pop("source")
    config = parse_as(TextPretrainConfig, raw, str(out / "config.json"))
    weights = sorted(folder.glob("*.safetensors"))
    learned = json.loads((out / "sources.json").read_text()) if (out / "sources.json").is_file() else None
    return {
        "name": config.name,
        "kind": "text",
        "class": json.loads((folder / "config.json").read_text())["architectures"][0],
        "parameters": {file.stem: parameters(file) for file in weights},
        "call": {"max_new_tokens": 16},
        "prompts": [question.prompt for question in questions(len(TASKS), 0, held_out=True)],
        "licence": LICENCE,
        "data": {"tasks": config.tasks is not None, "code": learned},
        "config": config.name,
        "settings": config.model_dump(mode="json", exclude={"name", "kind"}),
        "seed": config.seed,
        "steps": {"text": step},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizer": tokenizer,
        "sha256": {file.name: sha256(file) for file in weights},
    }
