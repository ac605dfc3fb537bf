"""Drafters made of others: two in one tree, and transformers' candidate generators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import MtpCache
from transformers.generation.candidate_generator import CandidateGenerator, MTPCandidateGenerator
from transformers.modeling_layers import MtpModel

import hasten
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.decode.drafters_candidates import Candidates
from hasten.pipelines.decode.drafters_small import SmallModel
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.decode.proposal import chain
from hasten.samplers.decode.protocols import Drafter
from hasten.samplers.decode.tree import Tree
from hasten.samplers.drafters.copy_input import Copy
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.drafters.mixed import Mixed, together
from hasten.testing import assert_lossless
from tests.contract_draft import DraftContract, TinyContract, ragged, small, tiny
from tests.pipelines.causal_models import build
from tests.samplers.drafters.test_drafters_small import mate


class TestMixed(TinyContract):
    def make(self, nodes: int) -> Drafter:
        return Mixed(first=LookUp(), second=Copy(), nodes=nodes, least=2.0)


class TestMixedWithSmall(DraftContract):
    def make(self, nodes: int) -> Drafter:
        return Mixed(first=LookUp(nodes=3, shortest=2), second=SmallModel.of(mate(), above=0.0), nodes=nodes)

    def test_both_draft(self) -> None:
        _, run = self.run(small(), ragged(3))
        names = {name for each in run.trace.rounds for name, *_ in each.sources}
        assert names == {"look-up", "small-model"}


class TestPromptLookup(TinyContract):
    def make(self, nodes: int) -> Drafter:
        return Candidates(nodes=nodes)


def test_assisted_candidates() -> None:
    model, tokenizer = tiny()
    inputs = tokenizer(["def area(width, height):\n    return", "class A:\n"], return_tensors="pt", padding=True)
    call = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, "max_new_tokens": 16, "do_sample": False}
    plain = model.generate(**call)
    with hasten.accelerate(model, Recipe(draft=Candidates(which="assisted", nodes=4), pace=Steady())) as run:
        assert torch.equal(model.generate(**call), plain)
    assert run.report().tokens_per_forward > 1.3


class RandomHeads(MTPCandidateGenerator):
    """transformers' generator with prediction layers of random weights: no checkpoint of this size has any."""

    def __init__(self, main_model: Any, generation_config: Any) -> None:
        torch.manual_seed(3)
        self.device, self.num_mtp_layers = main_model.device, 2
        self.mtp_model = MtpModel(main_model, 2).eval()
        self.mtp_cache = MtpCache(config=main_model.config.get_mtp_config())
        self.mtp_cache.activate_past_recording()
        self.do_sample, self.logits_processor, self.is_main_model_prefill = False, None, True


def test_generators_that_read_hidden_states() -> None:
    recipe = Recipe(draft=Candidates.of(RandomHeads, hidden=(-1,), nodes=2), pace=Steady())
    call = {"max_new_tokens": 12, "do_sample": False}
    model = build("llama", num_mtp_layers=2)
    plain = model.generate(**ragged(1), **call)
    with hasten.accelerate(model, recipe) as run:
        assert torch.equal(model.generate(**ragged(1), **call), plain)
        assert sum(drafted for drafted, _ in run.report().drafters.values()) > 10
        with pytest.raises(RefusedError, match="one text, and there are 2"):
            model.generate(**ragged(2), **call)


class Liar(CandidateGenerator):
    """Drafts what it finds most probable, and says that it was drawn from something flat."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model = model

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> Any:
        logits = self.model(input_ids).logits[:, -1:]
        return torch.cat([input_ids, logits.argmax(-1)], 1), torch.zeros_like(logits)


def test_what_a_generator_says_of_its_law_is_not_believed() -> None:
    found = assert_lossless(Candidates.of(Liar, nodes=1), None, small(), ragged(1), runs=250, greedy=False, top_k=3)
    assert found[0].accepted > 0.2


def test_points_and_draws_in_one_tree_are_lossless() -> None:
    drafter = Mixed(first=LookUp(nodes=2), second=SmallModel.of(mate(), above=0.0, width=2, depth=2), nodes=5, least=9.0)
    found = assert_lossless(drafter, None, small(), ragged(1), runs=1200, tokens=3, greedy=False, top_k=3)
    assert found[0].accepted > 0.1


def test_trees_are_packed_below_one_root() -> None:
    root = torch.tensor([5, 6])
    first = chain(root, torch.tensor([[1, 2], [3, 0]]), torch.tensor([[True, True], [True, False]]), "one")
    tree = Tree(root, sources=("two",))
    tree.know(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, 9))
    node = tree.draw(torch.zeros(2, 1, dtype=torch.long))
    tree.know(node, torch.ones(2, 1, 9))
    tree.draw(node)
    both = together(first, tree.proposal(), 3)
    both.check(9)
    assert both.sources == ("one", "two") and both.source is not None and both.drawn is not None and both.size == 4
    assert both.valid.tolist() == [[True] * 4] * 2
    assert both.parent.tolist() == [[-1, 0, 1, 0], [-1, 0, 0, 2]]
    assert both.source.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert both.drawn.tolist() == [[False, False, False, True], [False, False, True, True]]
    assert torch.allclose(both.q(torch.zeros(2, 1, dtype=torch.long)), torch.full((2, 1, 9), 1 / 9))
    with pytest.raises(UsageError, match="both drafters draw"):
        together(tree.proposal(), tree.proposal(), 9)
    with pytest.raises(ValueError, match="mixture itself"):
        Mixed(first=Mixed(first=LookUp(), second=Copy()), second=Copy())
