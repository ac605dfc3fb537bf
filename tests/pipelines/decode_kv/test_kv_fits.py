"""Models that cache policies are right on, or refuse in words: windows that only masks know, changed keys, other layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import hasten
from hasten.caching.decode.kept import KeptCache
from hasten.errors import RefusedError
from hasten.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

KEEP = Recipe(kv=KeptCache())
CALL: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "no_repeat_ngram_size": 3}
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def made(kind: str, leave: tuple[str, ...] = (), **more: Any) -> Any:
    torch.manual_seed(0)
    family: Any = getattr(transformers, kind if kind.endswith("Model") else f"{kind}ForCausalLM")
    config = family.config_class(**{name: value for name, value in (SIZES | more).items() if name not in leave})
    model = family(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(4 if weight.dim() > 1 else 1)
    return model


def prompts() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(2, 97, (3, 18))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
EQUAL: dict[str, dict[str, Any]] = {
    "OPT": {"leave": ("intermediate_size", "num_key_value_heads"), "ffn_dim": 64, "word_embed_proj_dim": 32},
    "Phimoe": {"sliding_window": 8, **EXPERTS},  # its attention modules do not say that there is a window
    "Cohere2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("kind", EQUAL)
def test_with_everything_kept_the_text_is_the_models_own(kind: str) -> None:
    model = made(kind, **EQUAL[kind])
    plain = model.generate(**prompts(), **CALL)
    with hasten.accelerate(model, KEEP) as run:
        assert torch.equal(model.generate(**prompts(), **CALL), plain)
    assert run.report().bytes > 0 and not run.notes


LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Llama4": ({"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "layer_types": ["chunked_attention"] * 2}, "chunked"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "conv"),
    "Bart": ({"leave": ("hidden_size", "num_hidden_layers"), "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, "position_ids"),
    "Gemma2": ({"head_dim": 8}, "caps its logits"),
    "GptOss": ({"head_dim": 8, **EXPERTS}, "sinks"),
    "Moshi": ({"sliding_window": 8, "ffn_dim": 64, "leave": ("intermediate_size",)}, "in its own cache"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_are_refused_before_anything_is_read(kind: str) -> None:
    more, words = REFUSED[kind]
    model = made(kind, **more)
    before = dict(model.__dict__)
    with pytest.raises(RefusedError, match=words) as caught:
        hasten.accelerate(model, KEEP)
    assert "Take a recipe that drafts" in str(caught.value)
    assert dict(model.__dict__) == before


@pytest.mark.parametrize(("kind", "more"), [("DeepseekV3", LATENT), ("DiffLlama", {})])
def test_keys_that_are_changed_behind_the_cache_are_refused(kind: str, more: dict[str, Any]) -> None:
    model = made(kind, **more)
    plain = model.generate(**prompts(), **CALL)
    with hasten.accelerate(model, KEEP), pytest.raises(RefusedError, match="between the cache and its attention"):
        model.generate(**prompts(), **CALL)
    assert torch.equal(model.generate(**prompts(), **CALL), plain)


@pytest.mark.parametrize(("kind", "name"), [("GPTNeoX", "shadow-kv"), ("GPT2LMHeadModel", "lazy-llm"), ("GPT2LMHeadModel", "shadow-kv")])
def test_models_with_other_names_for_things(kind: str, name: str) -> None:
    """No head_dim, keys turned in part; a base model that counts the columns of what its last layer gives."""
    model = made(kind, leave=("num_key_value_heads",) if kind == "GPTNeoX" else ("num_key_value_heads", "intermediate_size"))
    with hasten.accelerate(model, name) as run:
        text = model.generate(**prompts(), **CALL)
    assert text.shape == (3, 28) and run.report().layers
    assert name != "lazy-llm" or any((row.read or 1.0) < 1 for row in run.report().layers)


def test_what_a_filter_never_read_counts_as_text() -> None:
    model = made("Llama")
    with hasten.accelerate(model, "gem-filter") as run:
        model.generate(**prompts(), **CALL)
    report, tokens = run.report(), int(prompts()["attention_mask"].sum()) + 3 * 9
    assert [row.tokens for row in report.layers] == [tokens, tokens] and report.layers[0].held < tokens
    assert report.full_bytes == tokens * 2 * 2 * 32 * 4


@pytest.mark.parametrize(("kind", "slots"), [("Llama", slice(-4, None)), ("Mistral", slice(5, 8))])
def test_padding_that_no_place_follows_is_left_to_the_model(kind: str, slots: slice) -> None:
    model, inputs = made(kind, **({"sliding_window": 8} if kind == "Mistral" else {})), prompts()
    inputs["attention_mask"][0, slots] = 0
    plain = model.generate(**inputs, **CALL)
    with hasten.accelerate(model, "h2o") as run:
        assert torch.equal(model.generate(**inputs, **CALL), plain)
    assert any("padding" in note for note in run.notes)
