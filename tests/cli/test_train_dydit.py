"""`hasten train dydit` with a timed adapter, from start to end: stopped, resumed, used, refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL = [
    "--model", "tiny-image", "--set", "data.count=4", "--set", "data.prompts=[a seven, a three]",
    "--set", "data.call.num_inference_steps=2", "--train_batch_size", "2", "--rank=4", "--set", "student.experts=2",
]  # fmt: skip


def test_a_student_that_runs_less_is_trained_resumed_and_used(hasten: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ran = hasten("train", "dydit", "--out", str(out), *SMALL, "--max_train_steps", "1")
    assert ran.code == 0, ran.err
    ran = hasten("train", "dydit", "--out", str(out), *SMALL, "--max_train_steps", "3", "--resume")
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and all(0 < row["work"] <= 1 for row in rows)
    student = out / "student"
    assert {"recipe.yaml", "routers.safetensors", "timed_lora.safetensors"} <= {file.name for file in student.iterdir()}
    words = ["generate", "tiny-image", "--prompt", "a seven", "--recipe", student / "recipe.yaml", "--output", tmp_path / "seven.png"]
    ran = hasten(*words, "--steps", "3")
    assert ran.code == 0, ran.err
    assert (tmp_path / "seven.png").is_file()
    (student / "routers.safetensors").unlink()
    ran = hasten(*words)
    assert ran.code != 0 and "no routers" in ran.sentence
