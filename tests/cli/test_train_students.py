"""Students with a style below them, beside them, or with less attention: one command each, from start to picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from hasten.pipelines import loading
from hasten.pipelines.lora import FILE, Lora, LowRank

SMALL = [
    "--model", "tiny-flux", "--set", "data.count=4", "--set", "data.prompts=[a seven, a three]",
    "--set", "data.call.num_inference_steps=2", "--train_batch_size", "2", "--rank=4", "--max_train_steps", "2",
]  # fmt: skip


def style(file: Path) -> Path:
    """A normal LoRA that changes pictures a good deal."""
    network, g = loading.open_pipeline("tiny-flux", device="cpu", quiet=True).transformer, torch.Generator().manual_seed(0)
    layers = {}
    for name, module in network.named_modules():
        if name.endswith(("to_q", "to_v")):
            down = torch.randn(4, module.in_features, generator=g) / module.in_features**0.5
            layers[name] = LowRank(down, 0.5 * torch.randn(module.out_features, 4, generator=g), 4.0)
    return Lora("transformer", layers).save(file)


def picture(hasten: Any, recipe: Path, *more: Any) -> np.ndarray:
    file = recipe.parent / f"{len(more)}.png"
    ran = hasten("generate", "tiny-flux", "--prompt", "a seven", "--seed", "3", "--recipe", recipe, "--output", file, *more)
    assert ran.code == 0, ran.err
    return np.asarray(Image.open(file)).astype(float)


def test_a_normal_lora_becomes_a_few_step_lora(hasten: Any, tmp_path: Path) -> None:
    file = style(tmp_path / "style.safetensors")
    recipes = {}
    for merge in ("true", "false"):
        out = tmp_path / merge
        ran = hasten("train", "pairs", "--out", out, *SMALL, "--base_lora", file, "--set", f"student.merge={merge}")
        assert ran.code == 0, ran.err
        recipes[merge] = out / "student" / "recipe.yaml"
    ranks = {merge: Lora.load(recipe.parent / FILE).layers["transformer_blocks.0.attn.to_q"].rank for merge, recipe in recipes.items()}
    assert ranks == {"true": 8, "false": 4}
    whole = picture(hasten, recipes["true"])
    beside = picture(hasten, recipes["false"], "--lora", file)
    without = picture(hasten, recipes["false"])
    assert np.abs(whole - beside).max() <= 2
    assert np.abs(whole - without).mean() > max(0.2, 5 * np.abs(whole - beside).mean())


def test_styles_beside_are_named_and_must_stay_what_they_were(hasten: Any, tmp_path: Path) -> None:
    folder, out = tmp_path / "styles", tmp_path / "run"
    folder.mkdir()
    style(folder / "ink.safetensors")
    words = ["train", "dmd", "--out", out, *SMALL, "--set", "method.ratio=1", "--composable", folder]
    ran = hasten(*words)
    assert ran.code == 0, ran.err
    assert "composed with: ink.safetensors" in (out / "student" / "README.md").read_text()
    assert len(Lora.load(out / "student" / FILE).layers) > 4  # of its own, not the style's
    (folder / "ink.safetensors").unlink()
    style(folder / "oil.safetensors")
    ran = hasten(*words, "--resume")
    assert ran.code != 0 and "style_files" in ran.sentence


def test_a_student_that_reads_less(hasten: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ran = hasten("train", "pairs", "--out", out, *SMALL, "--set", "student.attention=semantic-tree:block=16")
    assert ran.code == 0, ran.err
    recipe = out / "student" / "recipe.yaml"
    attention = yaml.safe_load(recipe.read_text())["attention"]
    assert attention["kind"] == "sparse" and attention["warm"] == 0 and attention["min_tokens"] == 0
    report = tmp_path / "report.txt"
    ran = hasten("generate", "tiny-flux", "--prompt", "a seven", "--recipe", recipe, "--output", tmp_path / "a.png", "--report", report)
    assert ran.code == 0, ran.err
    assert "sparse" in report.read_text()
