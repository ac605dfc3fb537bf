"""`hasten train qalora` and `quest` from start to end on bundled models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SMALL = [
    "--set", "data.count=4", "--set", "data.prompts=[a seven, a three]", "--train_batch_size", "2", "--set", "method.steps=2",
    "--set", "method.points=1", "--set", "method.bins=2", "--set", "method.samples=1", "--learning_rate", "1e-2",
]  # fmt: skip


@pytest.mark.parametrize(("method", "model"), [("qalora", "tiny-flux"), ("quest", "tiny-image")])
def test_a_student_in_few_bits_is_trained_resumed_and_used(hasten: Any, tmp_path: Path, method: str, model: str) -> None:
    out = tmp_path / "run"
    words = ["train", method, "--model", model, "--out", str(out), *SMALL]
    ran = hasten(*words, "--max_train_steps", "2")
    assert ran.code == 0, ran.err
    ran = hasten(*words, "--max_train_steps", "3", "--resume")
    assert ran.code == 0, ran.err
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [0, 1, 2]
    recipe = out / "student" / "recipe.yaml"
    ran = hasten("generate", model, "--prompt", "a seven", "--steps", "2", "--recipe", recipe, "--output", tmp_path / "seven.png")
    assert ran.code == 0, ran.err
    assert (tmp_path / "seven.png").is_file()
    ran = hasten(*words, "--rank", "4")
    assert ran.code == 2 and "student.rank would do nothing" in ran.sentence
