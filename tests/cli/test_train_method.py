"""`hasten train METHOD` from start to end on a bundled model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hasten.cli.values import assignments

SMALL = [
    "--model", "tiny-flux", "--set", "data.count=4", "--set", "data.prompts=[a seven, a three]",
    "--set", "data.call.num_inference_steps=2", "--train_batch_size", "2", "--rank=4",
]  # fmt: skip


def test_a_student_is_trained_stopped_and_resumed(hasten: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ran = hasten("train", "pairs", "--out", str(out), *SMALL, "--max_train_steps", "2", "--json", str(tmp_path / "r.json"))
    assert ran.code == 0, ran.err
    assert "The teacher makes 4 samples" in ran.err and "Memory: weights" in ran.err
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["method"] == "pairs"
    ran = hasten("train", "pairs", "--out", str(out), *SMALL, "--max_train_steps", "3", "--resume")
    assert ran.code == 0 and "The teacher makes" not in ran.err, ran.err
    assert "hasten generate tiny-flux --prompt TEXT --recipe" in ran.out + ran.err
    recipe = out / "student" / "recipe.yaml"
    ran = hasten("generate", "tiny-flux", "--prompt", "a seven", "--recipe", recipe, "--output", tmp_path / "seven.png")
    assert ran.code == 0, ran.err
    assert (tmp_path / "seven.png").is_file()
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    ran = hasten("train", "pairs", "--out", str(out), *SMALL)
    assert ran.code == 2 and "already holds a training" in ran.sentence
    ran = hasten("train", "pairs", "--out", str(out), *SMALL, "--resume", "--learning_rate", "1")
    assert ran.code != 0 and "train.lr was" in ran.sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pairs", "--out", "x", "stray"], "belongs to no option"),
        (["pairs", "--out", "x", "--model", "tiny-fluks"], "tiny-flux"),
        (["pairs", "--out", "x", "--config", "no.yaml"], "no configuration 'no.yaml'"),
    ],
)
def test_wrong_words_are_answered(hasten: Any, words: list[str], sentence: str) -> None:
    ran = hasten("train", *words)
    assert ran.code == 2
    assert sentence in ran.sentence


def test_help_lists_what_a_method_can_be_told_and_means_every_word(hasten: Any) -> None:
    from hasten.cli.train_help import keys
    from hasten.cli.train_method import METHODS
    from hasten.distill.loop.settings import TrainSettings
    from hasten.distill.method import Method
    from hasten.distill.train_config import DataConfig, StudentConfig

    ran = hasten("train", "pairs", "--help")
    assert ran.code == 0 and "method. calls=1 own=false" in ran.out and "--learning_rate (train.lr)" in ran.out
    for method in METHODS:
        listed, _, meant = keys(method).partition("method.*")
        parts = {"method": Method.members()[method], "student": StudentConfig, "data": DataConfig, "train": TrainSettings}
        for section, part in parts.items():
            for name in part.model_fields:
                assert re.search(rf"\b{name}=", listed), f"{section}.{name} of {method} is not listed"
                assert re.search(rf"\b{name}\b", meant.partition("Names of other")[0]), f"{section}.{name} of {method} is not explained"


def test_what_is_listed_is_what_is_taken() -> None:
    """A default, typed as the help shows it, changes nothing."""
    from hasten.cli.train_help import _said
    from hasten.distill.train_config import load_config

    plain = load_config("sana-sprint", None, {"model": "tiny-flux"})
    for section in ("method", "student", "data", "train"):
        for name, field in type(getattr(plain, section)).model_fields.items():
            given = {"model": "tiny-flux", **assignments([f"{section}.{name}={_said(field)}"], "--set")}
            assert load_config("sana-sprint", None, given) == plain, f"{section}.{name}"
