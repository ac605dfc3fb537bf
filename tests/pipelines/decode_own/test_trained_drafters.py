"""Drafters that were trained on the model: their texts are the model's own, whatever they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.errors import ModelError
from hasten.recipe import Drafting
from hasten.samplers.drafters_own.medusa import Medusa
from hasten.samplers.drafters_own.prompts import Prompts
from tests.pipelines.causal_models import build
from tests.pipelines.decode_own.own_contract import (
    drafted,
    greedy_is_the_same,
    heads,
    prompt_tokens,
    prompts,
    restores,
    sampled_is_lossless,
)

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama").requires_grad_(False)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drafting]:
    folder = tmp_path_factory.mktemp("students")
    prompt_tokens(heads(folder))
    return {
        "ranked": Medusa(path=str(folder)), "static": Medusa(path=str(folder), tree="static"),
        "prompts": Prompts(path=str(folder)), "member": Prompts(path=str(folder), ensemble=1, drafts=3, nodes=16),
    }  # fmt: skip


NAMES = ("ranked", "static", "prompts", "member")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_texts_are_the_same(model: Any, parts: dict[str, Drafting], name: str) -> None:
    report = greedy_is_the_same(model, parts[name])
    assert report.exactness.startswith("exact") and report.tokens_per_forward >= 1
    restores(model, parts[name])


@pytest.mark.parametrize(("name", "tokens"), [("ranked", 3), ("prompts", 4)])
def test_sampled_texts_follow_the_models_law(model: Any, parts: dict[str, Drafting], name: str, tokens: int) -> None:
    """Prompt tokens ask in one round for the drafts of the next. Of few tokens, so that what nobody trained is right at times."""
    few = build("llama", vocab_size=14).requires_grad_(False)
    assert sampled_is_lossless(few, parts[name], tokens) > 0


def test_heads_that_say_the_truth_are_accepted(model: Any, tmp_path: Path) -> None:
    """A model to which all tokens are the same writes one token: heads that start as its own prediction say it, too."""
    stuck = build("llama").requires_grad_(False)
    stuck.model.embed_tokens.weight[:] = stuck.model.embed_tokens.weight[3].clone()
    stuck.lm_head.weight.mul_(10)
    part = Medusa(path=str(heads(tmp_path, spread=0.0)), nodes=3, width=1)
    _, report = drafted(stuck, part, prompts(1), max_new_tokens=17, do_sample=False)
    assert report.tokens_per_forward == 4


def test_files_that_do_not_fit(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hasten train medusa"):
        drafted(model, Medusa(path=str(tmp_path)), prompts(1), max_new_tokens=4)
    wide = build("llama", hidden_size=64, intermediate_size=64).requires_grad_(False)
    with pytest.raises(ModelError, match="64"):
        drafted(wide, Medusa(path=str(heads(tmp_path))), prompts(1), max_new_tokens=4)
