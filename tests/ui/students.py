"""A student that comes with hasten as the result of a training: what a training leaves, without its time."""

from __future__ import annotations

import shutil

from hasten.pipelines.lora import BUNDLED
from hasten.ui.engine import Engine, read

TRAINED = {"kind": "train", "method": "pairs", "model": "tiny-image", "prompts": ["a three"], "settings": {"train.steps": 2}}


def trained(engine: Engine, student: str = "tiny-image-1-call") -> str:
    """The recipe `trained:ID` of one."""
    with engine.outputs.making(read(TRAINED)) as out:
        shutil.copytree(BUNDLED / student, out.folder / "student")
        recipe = f"trained:{out.id}"
        out.facts = {
            "loss": [[0, 1.0], [1, 0.5]], "samples": [], "steps": 2, "step": 2, "finished": True, "student": True, "recipe": recipe,
            "model": "tiny-image",
        }  # fmt: skip
    return recipe
