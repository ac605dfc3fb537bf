"""Reading everything is dense attention: real transformers classes at tiny sizes, random weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from hasten.pipelines.causal.attention import attach
from hasten.sparse_attn.text.reader import Everything, Reader, Recent
from hasten.sparse_attn.text.votes import Votes
from tests.pipelines.causal_models import MODELS, SIZES, because, build, close, full, ids, no_grad, padding  # noqa: F401


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_density_1_is_dense(name: str, side: str) -> None:
    model, tokens, mask = build(name), ids(3, 37), padding(side, 37)
    dense = model(tokens, attention_mask=mask, use_cache=False).logits
    with attach(model, full()) as session:
        ours = model(tokens, attention_mask=mask, use_cache=False).logits
    close(ours, dense, mask)
    assert all(row.sparse == 1 and row.dense == 0 for row in session.rows.values()) and len(session.rows) == 3
    assert not session.reasons


@pytest.mark.parametrize("reader", [Everything(), Recent(window=999)], ids=lambda reader: reader.kind)
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_same_tokens(name: str, side: str, reader: Reader) -> None:
    model, tokens, mask = build(name), ids(3, 37), padding(side, 37)
    call = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    dense = model.generate(tokens, **call)
    with attach(model, full(reader)) as session:
        ours = model.generate(tokens, **call)
    assert torch.equal(ours, dense)
    slides = {"mistral-window": 3, "qwen2-mixed": 2}.get(name, 0)
    assert sum(row.sparse for row in session.rows.values() if row.phase == "cache") == 7 * (3 - slides)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_drafts_pieces_of_prompts_and_static_caches(name: str) -> None:
    model, tokens = build(name), ids(2, 90)
    dense = model(tokens, use_cache=False).logits
    static = StaticCache(config=model.config, max_cache_len=100)
    for cache in (DynamicCache(config=model.config), DynamicCache(), static):
        with attach(model, full()) as session:
            cuts = [0, 40, 80, 84, 85, 90]  # prompt, another piece of it, a draft, a token, a draft
            parts = [
                model(tokens[:, low:high], past_key_values=cache).logits
                for low, high in itertools.pairwise(cuts)
            ]
        close(torch.cat(parts, 1), dense)
        assert session.rows[0, "prompt"].sparse == 2, type(cache)


@pytest.mark.parametrize("extra", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}], ids=["drafts", "beams"])
@pytest.mark.parametrize("reader", [Everything(), Recent(window=999)], ids=lambda reader: reader.kind)
def test_other_ways_to_generate(extra: dict[str, int], reader: Reader) -> None:
    model, tokens = build("llama"), ids(1, 37)
    call = {"max_new_tokens": 12, "do_sample": False, **extra}
    dense = model.generate(tokens, **call)
    with attach(model, full(reader)):
        assert torch.equal(model.generate(tokens, **call), dense)


OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "phi3": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    },
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 9},
    "llama4_text": {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16},
}  # fmt: skip
"""Families whose attention differs from Llama's: other names for the cache, values narrower than keys, learned sinks,
chunked masks, mixtures of experts, windows in some layers."""

LEFT_ALONE = {"gpt_oss": "s_aux", "llama4_text": "mask"}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_right_or_left_alone(name: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, "num_hidden_layers": 2, **OTHERS[name]})
    model, tokens, mask = AutoModelForCausalLM.from_config(config).eval(), ids(3, 37), padding("left", 37)
    call = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    dense, made = model(tokens, attention_mask=mask).logits, model.generate(tokens, **call)
    with attach(model, full()) as session:
        close(model(tokens, attention_mask=mask).logits, dense, mask)
        assert torch.equal(model.generate(tokens, **call), made)
    assert torch.equal(model(tokens, attention_mask=mask).logits[mask.bool()], dense[mask.bool()])
    if name in LEFT_ALONE:
        because(session, LEFT_ALONE[name])
    else:
        assert not session.reasons and session.rows[1, "prompt"].sparse == 2 and session.rows[1, "cache"].sparse == 3


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("reader", [Everything(), Recent(window=999), Votes(top=99)], ids=lambda reader: reader.kind)
def test_a_draft_tree_is_read_by_its_mask(reader: Reader, side: str) -> None:
    model, tokens, mask = build("llama"), ids(3, 37), padding(side, 37)
    tree = torch.eye(5, dtype=torch.bool)
    tree[1, 0] = tree[2, 0] = True  # two continuations of the first new token
    tree[3, [0, 1]] = tree[4, [0, 2]] = True
    whole = torch.cat([mask.bool()[:, None, None].expand(3, 1, 5, 37), tree.expand(3, 1, 5, 5)], 3)
    at = mask.sum(1, keepdim=True) + torch.tensor([0, 1, 1, 2, 2])

    def draft() -> Tensor:
        cache = DynamicCache(config=model.config)
        model(tokens, attention_mask=mask, past_key_values=cache)
        logits: Tensor = model(ids(3, 5, seed=1), attention_mask=whole, position_ids=at, past_key_values=cache).logits
        return logits

    dense = draft()
    with attach(model, full(reader)) as session:
        close(draft(), dense)
    assert session.rows[0, "cache"].sparse == 1 and not session.reasons
