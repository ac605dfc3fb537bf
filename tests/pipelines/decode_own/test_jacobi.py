"""Speculative Jacobi decoding: windows drafted by the model's last word, in three ways of drawing, all lossless."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import hasten
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.drafters_own.same_noise import SameNoise
from hasten.samplers.drafters_own.speculative_jacobi import SpeculativeJacobi
from hasten.testing import assert_lossless
from tests.pipelines.causal_models import build
from tests.pipelines.decode_own.own_contract import greedy_is_the_same, prompts

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")


@pytest.fixture(scope="module")
def few() -> Any:
    """A model of few tokens, so that guesses are right now and then."""
    return build("llama", vocab_size=14).requires_grad_(False)


def test_greedy_texts_are_the_same() -> None:
    greedy_is_the_same(build("llama").requires_grad_(False), SpeculativeJacobi(nodes=6, row=3))


@pytest.mark.parametrize("noise", ["fresh", "coupled", "same"])
def test_sampled_texts_follow_the_models_law(few: Any, noise: Any) -> None:
    """Five tokens in windows of three: guesses of one round are drawn again, and verified, in the next ones."""
    part = SpeculativeJacobi(nodes=3, noise=noise)
    found = assert_lossless(part, SameNoise() if noise == "same" else None, few, tokens=5, runs=6000, greedy=False, top_k=2)
    assert max(each.accepted for each in found) > 0.1


def test_same_noise_writes_what_it_writes_without_drafts(few: Any) -> None:
    """With noise of its place, every token is what drawing one by one with this noise gives."""
    texts, forwards = [], []
    for nodes in (0, 6):
        recipe = Recipe(draft=SpeculativeJacobi(nodes=6, noise="same"), verify=SameNoise(), pace=Steady(nodes=nodes))
        with hasten.accelerate(few, recipe) as run:
            torch.manual_seed(3)
            texts.append(few.generate(**prompts(3) | {"input_ids": prompts(3)["input_ids"] % 14}, max_new_tokens=30, do_sample=True))
            forwards.append(len(run.trace.rounds))
    assert torch.equal(*texts) and forwards[1] < forwards[0]


def test_coupled_guesses_stay_as_often_as_the_laws_allow() -> None:
    from hasten.samplers.decode.coupling import coupled

    torch.manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.2, 0.3, 0.1, 0.4])
    runs = 40_000
    old = torch.multinomial(q, runs, replacement=True)
    new = coupled(p.expand(runs, -1), q.expand(runs, -1), old, torch.ones(runs, dtype=torch.bool))
    assert abs(float((new == old).float().mean()) - float(torch.minimum(p, q).sum())) < 0.01
    shares = [Counter(new.tolist())[token] / runs for token in range(4)]
    assert max(abs(share - float(chance)) for share, chance in zip(shares, p, strict=True)) < 0.01
