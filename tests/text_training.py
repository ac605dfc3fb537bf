"""Small text models for tests of training: kinds, configuration, sources to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.distill.pretrain.text_config import load_text_config

KINDS = {
    "full": {},
    "shifted": {"model.shifted": True},
    "block": {"model.attention": "block", "model.block": 8},
    "causal": {"model.attention": "causal"},
}


def config(kind: str = "full", **more: Any) -> Any:
    """The smallest configuration of a kind of attention."""
    return load_text_config("smoke-text", {**KINDS[kind], **more})


def written(folder: Path) -> Path:
    """`folder` with forty files of Python sources."""
    for i in range(40):
        (folder / f"m{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 4)
    return folder
