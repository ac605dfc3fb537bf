"""Trainings in a row, stored data of another training, and a student that begins where another ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hasten.distill.chain import ChainConfig, load_chain, train_chain
from hasten.distill.data import store
from hasten.distill.pretrain.config import parse_as
from hasten.distill.train_config import TrainConfig, load_config
from hasten.distill.training import train
from hasten.errors import UsageError

CALL = {"num_inference_steps": 2, "guidance_scale": 2.0}
DATA = {"prompts": ["a seven", "a three"], "count": 4, "call": CALL}
LAST: dict[str, Any] = {"method": {"kind": "dmd", "ratio": 1}, "train": {"steps": 2, "batch": 2, "lr": 1e-3, "warmup": 0}}
FIRST = LAST | {"method": {"kind": "pairs"}}
CHAIN = {"model": "tiny-image", "student": {"rank": 2}, "data": DATA, "stages": [FIRST, LAST]}


def weights(folder: Path, name: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(folder / "latest" / "student" / f"{name}.safetensors")


def test_a_stage_begins_with_the_student_of_the_one_before(tmp_path: Path) -> None:
    trainer = train_chain(parse_as(ChainConfig, CHAIN, "test"), tmp_path / "chain", progress=False)
    assert trainer.method.kind == "dmd" and (tmp_path / "chain" / "student" / "recipe.yaml").is_file()
    before, after = weights(tmp_path / "chain" / "1-pairs", "average"), weights(tmp_path / "chain" / "2-dmd")
    moved = torch.cat([(after[k] - before[k]).flatten() for k in before])
    assert float(moved.abs().max()) <= 2 * 1.1e-3, "two steps of AdamW go two rates far, from where the stage began"
    assert float(moved.abs().max()) > 0
    assert store.facts(tmp_path / "chain" / "data.safetensors")["data"] == "pairs", "what the most demanding stage needs"


def test_a_chain_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole = parse_as(ChainConfig, CHAIN, "test")
    train_chain(whole, tmp_path / "a", progress=False)
    first = parse_as(ChainConfig, CHAIN | {"stages": [FIRST]}, "test")
    train_chain(first, tmp_path / "b", progress=False)
    with pytest.raises(UsageError, match="already holds a training"):
        train_chain(whole, tmp_path / "b", progress=False)
    train_chain(whole, tmp_path / "b", resume=True, progress=False)
    one, two = (weights(tmp_path / name / "2-dmd") for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)


def pairs(**more: Any) -> TrainConfig:
    raw = {"model": "tiny-image", "student": {"rank": 2}, "data": DATA, **FIRST} | more
    return parse_as(TrainConfig, raw, "test")


def test_data_and_students_of_other_trainings(tmp_path: Path) -> None:
    train(pairs(), tmp_path / "a", progress=False)
    file = str(tmp_path / "a" / "data.safetensors")
    again = train(pairs(data={"file": file, "call": CALL}), tmp_path / "b", progress=False)
    assert len(again.data) == 4 and not (tmp_path / "b" / "data.safetensors").exists()
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(UsageError, match="was made with call"):
        train(pairs(data={"file": file, "call": CALL | {"guidance_scale": 3.0}}), tmp_path / "c", progress=False)
    with pytest.raises(UsageError, match="prompts of its own"):
        train(pairs(data={"file": file, "prompts": ["a one"]}), tmp_path / "c", progress=False)
    with pytest.raises(UsageError, match="needs own"):
        train(pairs(data={"file": file, "call": CALL}, method={"kind": "lora"}), tmp_path / "c", progress=False)
    with pytest.raises(UsageError, match="Say the same rank"):
        train(pairs(student={"rank": 3, "start": str(tmp_path / "a")}), tmp_path / "d", progress=False)
    with pytest.raises(UsageError, match="There is no student"):
        train(pairs(student={"rank": 2, "start": str(tmp_path)}), tmp_path / "e", progress=False)


def test_prompts_alone_are_no_pairs(tmp_path: Path) -> None:
    train(pairs(method={"kind": "dmd", "ratio": 1}), tmp_path / "a", progress=False)
    with pytest.raises(UsageError, match="pairs needs pairs"):
        file = str(tmp_path / "a" / "data.safetensors")
        train(pairs(data={"file": file, "call": CALL}), tmp_path / "b", progress=False)


@pytest.mark.parametrize(
    ("text", "given", "words"),
    [
        ("model: tiny-image\nstages: []\n", {}, "at least 1 item"),
        ("model: tiny-image\nstages: [{method: {kind: pairs}, trian: {}}]\n", {}, "Did you mean 'train'"),
        ("model: tiny-image\nstages: [{method: {kind: pairs}}]\n", {"learning_rate": 1}, "matter of each stage"),
        ("model: tiny-lm\nstages: [{method: {kind: medusa}}]\n", {}, "medusa trains a text model"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, given: dict[str, Any], words: str) -> None:
    (tmp_path / "chain.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        load_chain(tmp_path / "chain.yaml", given)


def test_a_file_with_changes(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("model: tiny-image\nstages: [{method: {kind: pairs}, train: {steps: 3}}]\n")
    config = load_chain(tmp_path / "chain.yaml", {"rank": 4, "data.count": 8})
    assert config.student.rank == 4 and config.stages[0].train.steps == 3
    stage = config.stage(0, tmp_path)
    assert load_config("pairs", None, {"model": "tiny-image"}).train != stage.train
    assert stage.data.file == str(tmp_path / "data.safetensors") and stage.student.start is None
