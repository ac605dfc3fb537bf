"""A trained language model as a folder: its adapter as plain peft reads it, and the recipe that it was trained for.

Shapes: as in `pipelines/lora.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from hasten.atomic import atomic_write
from hasten.distill.export.lora import lora_of, save_network
from hasten.distill.text.roles import TextRole
from hasten.errors import UsageError
from hasten.pipelines.lora import Lora
from hasten.recipe import Recipe

WEIGHTS, CONFIG, RECIPE = "adapter_model.safetensors", "adapter_config.json", "recipe.yaml"
"""The first two are the names that `PeftModel.from_pretrained(model, folder)` looks for."""

PREFIX = "base_model.model."
"""What peft's files have in front of a layer's name in the model."""


def save_student(role: TextRole, folder: Path, base: str, recipe: Recipe, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write the adapter of `role`, or its whole network for `from_pretrained`, and the recipe that it is to be decoded with.

    base: the model that an adapter belongs to, for its configuration. weights: as `lora_of`, such as the trained average.
    Raises `UsageError` for an adapter whose layers have different ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / RECIPE, recipe.to_yaml())
    if role.stage is None:
        return save_network(role, folder, weights)
    adapter = lora_of(role, weights)
    configured = _configuration(adapter, base)
    atomic_write(folder / WEIGHTS, save(_tensors(adapter), {"format": "pt"}))
    atomic_write(folder / CONFIG, json.dumps(configured, indent=2, sort_keys=True) + "\n")
    return folder


def _tensors(adapter: Lora) -> dict[str, Tensor]:
    found = {}
    for name, low in adapter.layers.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = low.down.cpu().contiguous()
        found[f"{PREFIX}{name}.lora_B.weight"] = low.up.cpu().contiguous()
    return found


def _configuration(adapter: Lora, base: str) -> dict[str, Any]:
    told = adapter.configuration()
    if told["rank_pattern"] or told["alpha_pattern"] or told["lora_bias"]:
        raise UsageError("This adapter has other ranks or biases in some layers; train it with one rank for all of them.")
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": told["r"], "lora_alpha": told["lora_alpha"], "target_modules": told["target_modules"], "bias": "none",
    }  # fmt: skip
