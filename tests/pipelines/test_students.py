"""The students that come with hasten: what their folders hold, and the recipes that find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import RefusedError
from hasten.pipelines import tiny_models
from hasten.pipelines.lora import BUNDLED, FILE, Lora
from hasten.pipelines.recipes import recipe
from hasten.pipelines.students import bundled, calls_of, students_of
from hasten.recipe import from_yaml

NAMES = [each.name for each in bundled()]


def image() -> Any:
    return tiny_models.load("tiny-image")


def made(pipe: Any, **call: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.as_tensor(pipe("a seven", generator=g, output_type="latent", **tiny_models.call_defaults(pipe) | call)[0])


def test_there_are_students_by_one_and_by_four_calls() -> None:
    assert [calls_of(each) for each in students_of("tiny-image")] == [1, 4]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_has_a_small_adapter_its_card_and_how_it_was_trained(name: str) -> None:
    folder = BUNDLED / name
    lora = Lora.load(folder)
    assert all(low.up.dtype == torch.float16 for low in lora.layers.values())
    assert (folder / FILE).stat().st_size < 1.5e6
    card = (folder / "README.md").read_text()
    assert tiny_models.sha256(folder / FILE) in card
    assert "| student |" in card and "| teacher, 50 steps |" in card, "measured"
    told = json.loads((folder / "training.json").read_text())
    assert told["config"]["model"] in tiny_models.names() and len(told["loss"]) >= 20
    assert told["cost"]["training_seconds"] < 3600, "at most half an hour on two cores"
    assert "/" not in str(told["config"]["data"]["file"]), "no folder of the machine it was trained on"


def test_fast_is_a_student_where_there_is_one() -> None:
    pipe = image()
    plain = made(pipe, num_inference_steps=2)
    with hasten.accelerate(pipe, "fast") as session:
        at_four = made(pipe)
        report = session.report()
    assert report.nfe == 4 and "4 calls" in str(report.trace.facts["student"])
    with hasten.accelerate(pipe, "fastest") as session:
        at_once = made(pipe)
        assert session.report().nfe == 1
    assert not torch.equal(at_four, at_once)
    assert torch.equal(made(pipe, num_inference_steps=2), plain), "everything is as it was"


def test_fast_without_a_student_leaves_evaluations_out() -> None:
    pipe = image()
    with hasten.accelerate(pipe, "fast:student=false") as session:
        one = made(pipe, num_inference_steps=50)
        assert 4 < session.report().nfe < 50
    assert session.recipe.reuse == recipe("fast").reuse
    other = tiny_models.load("tiny-flux")
    with hasten.accelerate(other, "fast") as session:
        assert session.recipe.axes.keys() == {"reuse"}
        assert "no student" in str(session.trace.facts["adapter"]), "said, not silent"
    assert torch.isfinite(one).all()


def test_other_weights_are_another_model() -> None:
    pipe = image()
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.1)
    with hasten.accelerate(pipe, "fast") as session:
        assert session.recipe.axes.keys() == {"reuse"}
    with pytest.raises(RefusedError, match="hasten has one for tiny-image"):
        hasten.accelerate(pipe, "fastest")


def test_a_recipe_wants_a_path_or_calls() -> None:
    for wrong in ({}, {"path": "x", "calls": 2}):
        with pytest.raises(hasten.HastenError, match="either path or calls"):
            from_yaml(f"adapter: {json.dumps(wrong)}")


def test_no_student_says_where_it_was_trained(tmp_path: Path) -> None:
    for file in BUNDLED.rglob("*"):
        if file.suffix in (".json", ".md", ".yaml"):
            assert "/tmp" not in file.read_text() and "/work" not in file.read_text(), file
