"""The minute: a teacher makes samples, a student learns to make them at once, and the contest says how near it came."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.distill.bench.contest import Contest, prompts
from hasten.distill.bench.table import student, teacher
from hasten.distill.pretrain.config import parse_as
from hasten.distill.train_config import TrainConfig
from hasten.distill.training import train

RAW = {
    "model": "tiny-image",
    "method": {"kind": "pairs"},
    "student": {"rank": 8},
    "data": {"prompts": prompts("image", 100), "count": 100, "call": {"num_inference_steps": 10}},
    "train": {"steps": 60, "batch": 32, "lr": 3e-3, "warmup": 5, "average": 0.9},
}


@pytest.mark.long
def test_a_minute_of_distillation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    train(parse_as(TrainConfig, RAW, "test"), tmp_path / "run", progress=False)
    contest = Contest.of("tiny-image", 100, {"num_inference_steps": 10})
    (full,) = teacher(contest, [10], lambda text: None)
    at_once = contest.row(contest.solver("keep", 1))
    (made,) = student(contest, tmp_path / "run", [1], lambda text: None)
    print(*({key: round(row[key], 3) for key in ("frechet", "recall", "accuracy")} for row in (full, at_once, made)), sep="\n")
    assert made["frechet"] < 0.5 * at_once["frechet"], "far ahead of the teacher's single step"
    assert made["frechet"] < 3 * full["frechet"], "and on the way to the teacher"
    assert made["recall"] > 0.5 and made["accuracy"] > 0.7
    assert made["training_seconds"] > 0 and made["peak_bytes"] > 0
