"""Models and calls in which drafts could not stand where plain decoding puts them: refused, or left to transformers, in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM, StoppingCriteria, StoppingCriteriaList

import hasten
from hasten.errors import RefusedError
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.drafters.look_up import LookUp
from tests.pipelines.causal_models import SIZES, build

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

ALWAYS = Recipe(name="always", draft=LookUp(nodes=9), pace=Steady())
CALL: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "no_repeat_ngram_size": 4}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama").requires_grad_(False)


def ids(rows: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(2, 97, (rows, 6)).repeat(1, 3)


def same(model: Any, inputs: dict[str, Any], **call: Any) -> Any:
    """The texts are the same; the session."""
    plain = model.generate(**inputs, **CALL | call)
    with hasten.accelerate(model, ALWAYS) as run:
        assert torch.equal(model.generate(**inputs, **CALL | call), plain)
    return run


def other(name: str, config: str, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None,
    }  # fmt: skip
    found = getattr(transformers, name)(getattr(transformers, config)(**sizes | more)).eval()
    for weight in found.parameters():
        weight.data *= 4 if weight.dim() > 1 else 1
    return found.requires_grad_(False)


NEO: dict[str, Any] = {"num_layers": 2, "window_size": 6, "max_position_embeddings": 64}


@pytest.mark.parametrize(("name", "config", "more", "words"), [
    ("BloomForCausalLM", "BloomConfig", {"n_layer": 2, "n_head": 4}, "position_ids"),
    ("BartForCausalLM", "BartConfig", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, "position_ids"),
    ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", {"n_layer": 2, "n_head": 4, "n_embd": 32}, "past_key_values"),
    ("FalconForCausalLM", "FalconConfig", {"alibi": True}, "ALiBi"),
    ("GPTNeoForCausalLM", "GPTNeoConfig", NEO | {"attention_types": [[["global", "local"], 1]]}, "counts slots"),
])  # fmt: skip
def test_models_that_count_slots_are_refused(name: str, config: str, more: dict[str, Any], words: str) -> None:
    model = other(name, config, **more)
    with pytest.raises(RefusedError, match=words):
        hasten.accelerate(model, ALWAYS)
    assert "generate" not in model.__dict__


def test_only_local_layers_are_the_trouble() -> None:
    model = other("GPTNeoForCausalLM", "GPTNeoConfig", **NEO | {"attention_types": [[["global"], 2]]})
    assert same(model, {"input_ids": ids()}).calls == {"drafted": 1}


def phi(kind: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = SIZES | {"rope_parameters": {"rope_theta": 10_000.0, **kind}, "sliding_window": None} | more
    found = Phi3ForCausalLM(Phi3Config(**sizes)).eval()
    for weight in found.parameters():
        weight.data *= 4 if weight.dim() > 1 else 1
    return found.requires_grad_(False)


LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 5.0, 9.0, 20.0], "factor": 10.0,
}  # fmt: skip


def test_keys_that_are_turned_anew_in_long_texts() -> None:
    model = phi(LONG, original_max_position_embeddings=24)
    assert same(model, {"input_ids": ids()}, max_new_tokens=6).calls == {"drafted": 1}
    crossing = same(model, {"input_ids": ids()}, max_new_tokens=12)
    assert crossing.calls == {"plain": 1} and "24 tokens" in crossing.trace.notes[0]
    assert same(model, {"input_ids": ids().repeat(1, 2)}).calls == {"drafted": 1}
    padded = torch.cat([torch.zeros(1, 12, dtype=torch.long), ids()], 1)
    assert same(model, {"input_ids": padded, "attention_mask": (padded > 0).long()}).calls == {"plain": 1}


def test_keys_that_are_turned_anew_by_every_token() -> None:
    model = build("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}, max_position_embeddings=24)
    assert same(model, {"input_ids": ids()}, max_new_tokens=6).calls == {"drafted": 1}
    assert same(model, {"input_ids": ids()}, max_new_tokens=12).calls == {"plain": 1}


def test_padding_has_to_stand_on_the_left(model: Any) -> None:
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[1, -4:] = 0
    run = same(model, {"input_ids": ids(2), "attention_mask": mask})
    assert run.calls == {"plain": 1} and "pad on the left" in run.trace.notes[0]
    holes = torch.ones(2, 18, dtype=torch.long)
    holes[1, 5:8] = 0
    assert same(model, {"input_ids": ids(2), "attention_mask": holes}).calls == {"drafted": 1}
    assert same(build("qwen2-mixed"), {"input_ids": ids(2), "attention_mask": holes}).calls == {"plain": 1}


@pytest.mark.parametrize("known", [4, 10])  # fewer than the new ones, more of them
def test_new_tokens_alone_behind_a_cache(model: Any, known: int) -> None:
    def inputs() -> dict[str, Any]:
        cache = DynamicCache()
        with torch.no_grad():
            model(ids()[:, :known], past_key_values=cache)
        return {"input_ids": ids()[:, known:], "attention_mask": torch.ones_like(ids()), "past_key_values": cache}

    plain = model.generate(**inputs(), **CALL)
    with hasten.accelerate(model, ALWAYS) as run:
        assert torch.equal(model.generate(**inputs(), **CALL), plain)
    assert run.calls == {"plain": 1} and "pass the whole text" in run.trace.notes[0]


class WhenAny(StoppingCriteria):
    """All rows end where one of them has a certain token."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), bool((input_ids[:, 18:] % 9 == 4).any()))


def test_criteria_may_look_at_all_rows(model: Any) -> None:
    for rows, how in ((1, "drafted"), (3, "plain")):
        run = same(model, {"input_ids": ids(rows)}, stopping_criteria=StoppingCriteriaList([WhenAny()]))
        assert run.calls == {how: 1}
    assert "WhenAny may look at all rows" in run.trace.notes[0]
