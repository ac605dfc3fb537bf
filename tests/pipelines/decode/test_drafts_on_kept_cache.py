"""Drafts behind a cache that forgets: the texts of the policy alone, by fewer forwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import hasten
from hasten.errors import UsageError
from hasten.pipelines import tiny_models
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.drafters.look_up import LookUp

TEXTS = ["import os\nimport sys\n\n\ndef main(argv: list[str]) -> int:\n    ", "class Reader:\n    def __init__(self, path: str) -> None:\n        self."]


class Deep(LookUp):
    """A drafter that reads a hidden state."""

    kind: ClassVar[str] = "deep-in-a-test"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden:1"})


@pytest.fixture(scope="module")
def host() -> Iterator[tuple[Any, dict[str, Tensor]]]:
    model, tokenizer = tiny_models.text("tiny-lm")
    yield model, dict(tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left"))


def written(model: Any, inputs: dict[str, Tensor], tokens: int = 32, **more: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kv", ["snapkv:tokens=12,queries=4", "int8-kv", "hydragen", "gem-filter", "pyramid-kv:tokens=16"])
@pytest.mark.parametrize("draft", ["look-up", "speculative:nodes=4"])
def test_the_text_is_that_of_the_policy_alone(host: Any, kv: str, draft: str) -> None:
    """Of policies that choose when the prompt has been read: nothing that a draft does can change what they keep."""
    model, inputs = host
    plain = written(model, inputs)
    with hasten.accelerate(model, kv):
        alone = written(model, inputs)
    with hasten.accelerate(model, hasten.recipe(f"{kv}+{draft}").model_copy(update={"pace": Steady()})) as run:
        both = written(model, inputs)
        held = run.cache.report()
    assert torch.equal(alone, both)
    assert run.calls == {"drafted": 1} and run.report().tokens_per_forward > 1.0
    assert run.closed and run.cache.closed and torch.equal(written(model, inputs), plain), "and the model is as it was"
    assert any(row.evicted or row.packed for row in held.layers) or kv in ("hydragen", "gem-filter")
    assert ("lossy: the cache" in str(run.report())) == (kv != "hydragen")


def test_what_leaves_while_text_is_written_stays_within_its_budget(host: Any) -> None:
    model, inputs = host
    with hasten.accelerate(model, "h2o:tokens=16+look-up") as run:
        text = written(model, inputs, 40)
        rows = run.cache.report().layers
    assert text.shape[1] > inputs["input_ids"].shape[1] and all(row.held <= 2 * 16 and row.evicted > 0 for row in rows)


def test_another_cache_is_left_to_transformers(host: Any) -> None:
    model, inputs = host
    one = {name: each[:1] for name, each in inputs.items()}
    with pytest.warns(UserWarning, match="its cache is a StaticCache, and not the recipe's"), hasten.accelerate(model, "snapkv+look-up") as run:
        static = written(model, one, 8, past_key_values=StaticCache(model.config, max_cache_len=128))
    assert run.calls == {"plain": 1} and torch.equal(static, written(model, one, 8))


def test_what_does_not_go_together_is_refused_and_nothing_is_left_behind(host: Any) -> None:
    model, inputs = host
    with pytest.raises(UsageError, match="reads the states of every token of the prompt"):
        hasten.accelerate(model, hasten.recipe("gem-filter") | Recipe(draft=Deep()))
    with pytest.raises(UsageError, match="sets attention beside draft"):
        hasten.accelerate(model, "quest+look-up")
    with hasten.accelerate(model, "snapkv+look-up"), pytest.raises(UsageError, match="accelerated already"):
        hasten.accelerate(model, "snapkv+look-up")
    assert "generate" not in vars(model) and "forward" not in vars(model.base_model)
    assert written(model, inputs, 4).shape[1] == inputs["input_ids"].shape[1] + 4
