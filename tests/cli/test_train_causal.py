"""Causal video students from the command line: stage after stage, used at once, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON = [
    "--set", "data.count=2", "--set", "data.prompts=[a seven moving left, a three moving up]", "--rank=2",
    "--set", "data.call.num_inference_steps=2", "--set", "data.call.height=16", "--set", "data.call.width=16",
    "--train_batch_size", "1", "--set", "method.calls=2",
]  # fmt: skip
SMALL = ["--model", "tiny-video", *COMMON, "--set", "data.call.num_frames=5"]
"""Three latent frames of sixteen tokens."""


def test_a_student_in_chunks_is_trained_in_two_stages_and_generates(hasten: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    chunk = ["--set", "method.chunk=1"]
    ran = hasten("train", "causal", "--out", first, *SMALL, *chunk, "--max_train_steps", "1")
    assert ran.code == 0, ran.err
    forcing = [*SMALL, *chunk, "--start", first, "--set", "method.ratio=1"]
    ran = hasten("train", "self-forcing", "--out", second, *forcing, "--max_train_steps", "1")
    assert ran.code == 0, ran.err
    ran = hasten("train", "self-forcing", "--out", second, *forcing, "--max_train_steps", "2", "--resume")
    assert ran.code == 0 and "hasten generate tiny-video --prompt TEXT --recipe" in ran.out + ran.err, ran.err
    assert [json.loads(line)["step"] for line in (second / "log.jsonl").read_text().splitlines()] == [0, 1]
    small = ["--height", "16", "--width", "16", "--prompt", "a seven moving left", "--output", tmp_path / "seven.gif"]
    recipe = second / "student" / "recipe.yaml"
    ran = hasten("generate", "tiny-video", "--recipe", recipe, *small, "--frames", "9", "--report", tmp_path / "r.txt")
    assert ran.code == 0, ran.err
    assert "chunks of 1 latent frame that read all frames before it, 2 calls each" in (tmp_path / "r.txt").read_text()
    window = ["--set", "sampler.window=2", "--set", "sampler.sink=1"]
    ran = hasten("generate", "tiny-video", "--recipe", recipe, *small, "--frames", "13", *window, "--json", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    row = json.loads((tmp_path / "r.json").read_text())["rows"][0]
    assert row["frames"] == 13 and row["nfe"] == 14 and row["bytes_held"] == 2 * 12 * 3 * 16 * 128 * 4


def test_what_makes_no_clips_is_said_before_anything_is_trained(hasten: Any, tmp_path: Path) -> None:
    ran = hasten("train", "self-forcing", "--out", tmp_path, "--model", "tiny-flux", *COMMON)
    assert ran.code == 2 and "Chunks of frames need a video model" in ran.err, ran.err
