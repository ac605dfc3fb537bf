"""Prompts are data: a resumed training with others is refused, however many lines the file has."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.distill.train_config import load_config
from hasten.distill.training import train
from hasten.errors import ResumeError

GIVEN = {"train.steps": 2, "train.batch": 2, "rank": 2, "data.count": 2}


def test_pictures(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a seven\na three\n")
    call = {"data.call.num_inference_steps": 2, "prompts": str(prompts), "model": "tiny-flux"}
    config = load_config("pairs", None, GIVEN | call)
    train(config, tmp_path / "out", stop_after=1, progress=False)
    prompts.write_text("a seven\na nine!\n")
    with pytest.raises(ResumeError, match="The data have changed"):
        train(config, tmp_path / "out", resume=True, progress=False)
    prompts.write_text("# as it was\na seven\n\na three\n")
    assert len(train(config, tmp_path / "out", resume=True, progress=False).data) == 2


def test_texts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("sort: b a\n")
    call = {"data.call.recipe": "sequential", "data.call.max_new_tokens": 8, "prompts": str(prompts), "model": "tiny-lm"}
    config = load_config("medusa", None, GIVEN | call)
    train(config, tmp_path / "out", stop_after=1, progress=False)
    prompts.write_text("sort: c a\n")
    with pytest.raises(ResumeError, match="The data have changed"):
        train(config, tmp_path / "out", resume=True, progress=False)
