"""Medusa heads of `hasten train medusa` in the folder that vLLM loads as a draft model.

vLLM's `medusa.py` reads `blocks.I.layers.J` (x + SiLU(W x), with a bias where `medusa_fc_bias` says so) and one last layer for
all heads as `lm_heads.0` where `original_lm_head` says so: just what ours are. It drafts the best token of each head, as a
chain. SGLang has no Medusa.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hasten.atomic import atomic_write
from hasten.errors import ModelError
from hasten.pipelines.handover.served import Served

HEADS = "medusa_heads.safetensors"


def serve_medusa(model: Any, name: str, heads: Path, into: Path) -> Served:
    """Write the heads for vLLM (`save_for_vllm`), and say how it is started with them. name: what the server calls the model."""
    save_for_vllm(heads, model, into)
    count = json.loads((into / "config.json").read_text(encoding="utf-8"))["num_heads"]
    speculative = {"method": "medusa", "model": str(into), "num_speculative_tokens": count}
    return Served(
        "vLLM", {"model": name, "speculative_config": speculative},
        ["vllm", "serve", name, "--speculative-config", json.dumps(speculative)],
        ("vLLM drafts the best token of each head, as a chain; hasten drafts a tree of several of each.",),
    )  # fmt: skip


def save_for_vllm(heads: Path, model: Any, into: Path) -> Path:
    """Write the heads that a training left in the folder (or file) `heads` as vLLM's draft model, into the folder `into`.

    model: the causal model that they were trained on, whose last layer they share. Returns `into`.

    Raises `ModelError` where there are no such heads, or they are for a model of another width.
    """
    file = heads / HEADS if heads.is_dir() else heads
    blocks = _blocks(file)
    last: Tensor = model.get_output_embeddings().weight
    vocabulary, width = last.shape
    if (found := blocks[0]["weight"].shape[1]) != width:
        raise ModelError(f"{file} has heads for a model of width {found}, and this {type(model).__name__} has {width}.")
    tensors = {
        f"blocks.{number}.layers.0.{name}": value.to(last.dtype).contiguous()
        for number, block in enumerate(blocks)
        for name, value in block.items()
    }
    tensors["lm_heads.0.weight"] = last.detach().cpu().contiguous()
    config = {
        "model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": width, "vocab_size": vocabulary,
        "truncated_vocab_size": vocabulary, "num_heads": len(blocks), "num_hidden_layers": 1, "medusa_fc_bias": "bias" in blocks[0],
        "original_lm_head": True, "torch_dtype": str(last.dtype).removeprefix("torch."),
    }  # fmt: skip
    into.mkdir(parents=True, exist_ok=True)
    atomic_write(into / "model.safetensors", save(tensors, {"format": "pt"}))
    atomic_write(into / "config.json", json.dumps(config, indent=1) + "\n")
    return into


def _blocks(file: Path) -> list[dict[str, Tensor]]:
    """Weight and bias of each head, in order."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"There are no Medusa heads in {file} ({error}). Name the student's folder of a hasten train medusa.") from None
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, number, which = (name.split(".") + ["", "", ""])[:3]
        if part != "blocks" or not number.isdigit() or which not in ("weight", "bias") or not torch.isfinite(value).all():
            raise ModelError(f"{file} has a tensor {name!r} that is none of Medusa heads, or not finite.")
        found.setdefault(int(number), {})[which] = value
    if sorted(found) != list(range(len(found))) or not found or any("weight" not in block for block in found.values()):
        raise ModelError(f"{file} has no complete Medusa heads: {', '.join(sorted(tensors)) or 'nothing'}.")
    return [found[number] for number in range(len(found))]
