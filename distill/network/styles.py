"""Styles to be composed with: normal LoRAs that a few-step student is trained beside, so that it goes with them later.

A few-step LoRA that was trained alone often loses a style that is loaded beside it. Here every step has one of the styles on
teacher and student alike, or none (`Roles.styled`); the teacher with the style is what the student with the style learns from.

Shapes: none of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hasten.errors import UsageError
from hasten.pipelines import loading


def files(places: Sequence[str]) -> list[Path]:
    """LoRA files: those named, and all .safetensors of a folder that is named, by name. Raises `UsageError` where there is
    none."""
    found: list[Path] = []
    for place in map(Path, places):
        here = place.expanduser()
        inside = sorted(here.glob("*.safetensors")) if here.is_dir() else [here]
        if not inside or not all(file.is_file() and file.suffix == ".safetensors" for file in inside):
            raise UsageError(f"There is no style at '{place}'. Name a LoRA's .safetensors file, or a folder with some.")
        found += inside
    return found


def digests(places: Sequence[str]) -> dict[str, Any]:
    """File -> sha256 below `style_files`, so that a resumed training meets the same ones; {} without styles."""
    return {"style_files": {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files(places)}} if places else {}


def put_on(pipe: Any, network: nn.Module, places: Sequence[str]) -> dict[str, str]:
    """Load all styles onto the pipeline's network; adapter's name -> its file's name. Text encoders keep what they say.

    Raises `ModelError` for one that does not fit, `UsageError` as `files`, and for one that changes nothing of the network.
    """
    known: dict[str, str] = {}
    for number, file in enumerate(files(places), 1):
        name = f"style_{number}"
        loading.add_lora(pipe, file, name)
        if name not in getattr(network, "peft_config", {}):
            raise UsageError(f"The style '{file}' changes nothing of {type(network).__name__}. Leave it out.")
        known[name] = file.name if file.name != "pytorch_lora_weights.safetensors" else f"{file.parent.name}/{file.name}"
    return known
