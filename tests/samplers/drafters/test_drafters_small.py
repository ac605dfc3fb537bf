"""Drafts of a small model: the contract, its own keys and values, and what it refuses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import ModelError, RefusedError
from hasten.pipelines.decode.drafters_small import SmallModel
from hasten.pipelines.decode.small_model import Reader
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.decode.protocols import Drafter
from hasten.testing import assert_lossless
from tests.contract_draft import DraftContract, ragged, small, tiny
from tests.pipelines.causal_models import build


@cache
def mate() -> Any:
    """Two of the three layers of `small`, so that it is often right."""
    model = build("llama", num_hidden_layers=2)
    model.load_state_dict({name: value for name, value in small().state_dict().items() if ".2." not in name})
    return model.requires_grad_(False)


class TestSmallTree(DraftContract):
    def make(self, nodes: int) -> Drafter:
        return SmallModel.of(mate(), above=0.0, nodes=nodes)

    def test_is_a_part(self) -> None:
        drafter = SmallModel(nodes=5)
        assert SmallModel(**dict(drafter)) == drafter and "DySpec" in str(SmallModel.__doc__)


class TestSmallChain(TestSmallTree):
    def make(self, nodes: int) -> Drafter:
        return SmallModel.of(mate(), above=0.0, nodes=nodes, width=1)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_model_itself_is_always_right(rows: int) -> None:
    """What it keeps of its own keys and values is right, in all rows: else its drafts would be refused now and then."""
    model = small()
    recipe = Recipe(draft=SmallModel.of(model, above=0.0, nodes=3, width=1, depth=3), pace=Steady())
    with hasten.accelerate(model, recipe) as run:
        model.generate(**ragged(rows), max_new_tokens=41, do_sample=False)
    assert run.report().tokens_per_forward == pytest.approx(4, abs=0.05)


def test_packing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.pipelines.decode.small_model.SLACK", 0)
    test_the_model_itself_is_always_right(3)


def test_a_reader_reads_what_the_model_reads() -> None:
    model, inputs = small(), ragged(3)
    texts = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    reader = Reader(model, 3, torch.device("cpu"))
    reader.text([text[:4] for text in texts], [0, 0, 0])
    logits = reader.text([text[4:] for text in texts], [4, 4, 4])
    for row, text in enumerate(texts):
        assert torch.allclose(logits[row], model(torch.tensor([text])).logits[0, -1], atol=1e-4)


@pytest.mark.parametrize("width", [1, 3])
def test_sampled_texts_follow_the_model(width: int) -> None:
    """The law that a draft was drawn from is the one that it is verified with."""
    found = assert_lossless(
        SmallModel.of(mate(), above=0.0, nodes=4, width=width, depth=2), None, small(), ragged(1), runs=2000, greedy=False, top_k=3
    )
    assert found[0].accepted > 0.1


def test_another_tokenizer_is_refused() -> None:
    other = build("llama", vocab_size=50)
    with hasten.accelerate(small(), Recipe(draft=SmallModel.of(other))), pytest.raises(RefusedError, match="another tokenizer.*assistant_tokenizer"):
        small().generate(**ragged(1), max_new_tokens=4)
    with hasten.accelerate(small(), Recipe(draft=SmallModel(model="tiny-drift"))), pytest.raises(ModelError, match="no small model .tiny-drift."):
        small().generate(**ragged(1), max_new_tokens=4)


@pytest.mark.filterwarnings("ignore:hasten:UserWarning")
@pytest.mark.parametrize("rows", [1, 3])
def test_bundled_pair(rows: int) -> None:
    model, tokenizer = tiny()
    inputs = tokenizer(["def area(width, height):\n    return", "import os\n", "class A:"][:rows], return_tensors="pt", padding=True)
    call = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, "max_new_tokens": 24, "do_sample": False}
    plain = model.generate(**call)
    with hasten.accelerate(model, Recipe(draft=SmallModel(), pace=Steady())) as run:
        assert torch.equal(model.generate(**call), plain)
    assert run.report().tokens_per_forward > 1.5
