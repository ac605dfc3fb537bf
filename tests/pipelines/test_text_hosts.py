"""The small copies behave as their originals do where an adapter could trip: masks, positions, caches, shifts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.text_hosts import FAMILIES, Host, bd3lm, dream, fast_dllm_v2, llada, llada2, llada_moe, mdlm, sdar
from tests.text_hosts.facts import block_causal

N = 13
CLOSE = 2e-5
"""Between sums in another order: logits are of size one, their float32 error here is below 5e-6."""


def drawn(rows: int = 2, count: int = N, seed: int = 0) -> Tensor:
    return torch.randint(0, 93, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_builds_from_its_seed(name: str) -> None:
    ids = drawn(count=17)
    first, again, other = (FAMILIES[name](seed) for seed in (1, 1, 2))
    logits = first.facts.plain(first.model, ids)
    assert torch.equal(logits, again.facts.plain(again.model, ids))
    assert apart(logits, other.facts.plain(other.model, ids)) > 0.1
    assert logits.isfinite().all() and logits.std() > 0.3
    assert logits.shape[0] == 2 and logits.shape[2] >= first.facts.vocab


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "diffusion-gemma"])
def test_reads_what_its_facts_say(name: str) -> None:
    """Change one token; the logits that change are exactly those that may read it."""
    model, facts = FAMILIES[name](3)
    ids = drawn(1, 19)
    before = facts.plain(model, ids)
    for place in (0, 9, 18):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 93
        moved = (facts.plain(model, changed) - before).abs().amax((0, 2)) > 1e-4
        block = {"full": 19, "block": facts.block, "causal": 1}[facts.kind]
        assert torch.equal(moved, block_causal(19, block)[:, place]), place


def test_llada_masks_keys_or_ignores_the_mask() -> None:
    ids = drawn()
    keys = torch.ones_like(ids)
    keys[:, :4] = 0
    for name, uses in (("llada", True), ("llada-unmasked", False)):
        model, facts = FAMILIES[name](1)
        masked = model(ids, attention_mask=keys).logits
        assert (apart(masked, facts.plain(model, ids)) > 0.05) is uses
    bias = keys[:, None, None, :].bool().expand(-1, 1, N, -1)
    model = FAMILIES["llada"](1).model
    assert apart(model(ids, attention_bias=bias).logits, model(ids, attention_mask=keys).logits) < CLOSE


@pytest.mark.parametrize("name", llada.FAMILIES)
def test_llada_keeps_keys_before_rope(name: str) -> None:
    model, facts = FAMILIES[name](1)
    ids = drawn()
    kept = model(ids, use_cache=True).past_key_values
    past = [(k[:, :, :6], v[:, :, :6]) for k, v in kept]
    assert apart(model(ids[:, 6:], past_key_values=past).logits, facts.plain(model, ids)[:, 6:]) < CLOSE
    assert kept[0][0].shape[1] == model.config.n_kv_heads
    block = model.model.transformer["blocks"][0]
    entered = block.attn_norm(model.get_input_embeddings()(ids))
    assert torch.equal(kept[0][0].transpose(1, 2).flatten(2), block.k_proj(entered))


def test_llada_refuses_attentions_and_ties() -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        FAMILIES["llada"](1).model(drawn(), output_attentions=True)
    tied = FAMILIES["llada-tied"](1).model
    assert tied.get_output_embeddings() is tied.get_input_embeddings()
    assert FAMILIES["llada"](1).model.get_output_embeddings().out_features == 128


def test_llada_moe_takes_no_cache_and_routes() -> None:
    model, facts = FAMILIES["llada-moe"](1)
    for wrong in ({"use_cache": True}, {"cache_position": torch.arange(N)}, {"num_logits_to_keep": 1}):
        with pytest.raises(AssertionError):
            model(drawn(), **wrong)
    block = model.model.layers[1].mlp
    assert isinstance(block, llada_moe.LLaDAMoESparseMoeBlock)
    chosen, weights = block.route(torch.randn(50, 32))
    assert len(chosen.unique()) > 4 and (weights.sum(-1) < 0.999).any()
    ids, keys = drawn(), torch.ones(2, N)
    keys[1, 8:] = 0
    alone = facts.plain(model, ids[1:, :8])
    assert apart(model(ids, attention_mask=keys).logits[1:, :8], alone) < CLOSE


def test_llada2_makes_two_dimensional_masks_causal() -> None:
    model, facts = FAMILIES["llada2"](1)
    ids = drawn()
    causal = model(ids, attention_mask=block_causal(N, 1)[None, None].expand(2, -1, -1, -1)).logits
    keys = torch.ones_like(ids)
    assert apart(model(ids, attention_mask=keys).logits, causal) < CLOSE
    assert apart(model(ids).logits, causal) > 0.05  # none: all see all
    cache = DynamicCache()
    model(ids[:, :8], past_key_values=cache)
    assert cache.get_seq_length() == 8
    own = llada2.as_pairs(block_causal(N, 8)[None, None], torch.zeros(2, N, 1), 0)
    assert own is not None
    later = model(ids[:, 8:], attention_mask=own[:, :, 8:], past_key_values=cache).logits
    assert apart(later, facts.plain(model, ids)[:, 8:]) < CLOSE


def test_llada2_router_keeps_to_its_groups() -> None:
    gate = FAMILIES["llada2"](1).model.model.layers[1].mlp.gate
    chosen, weights = gate(torch.randn(64, 32))
    assert torch.allclose(weights.sum(-1), torch.full((64,), 2.5))
    assert ((chosen // 2).sort(-1).values.diff().abs() > 0).any()


def test_dream_masks() -> None:
    model, facts = FAMILIES["dream"](1)
    ids = drawn()
    full = facts.plain(model, ids)
    assert torch.equal(model(ids).logits, full) and torch.equal(model(ids, torch.ones_like(ids)).logits, full)
    keys = torch.ones_like(ids)
    keys[1, :3] = 0
    where = (keys.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, keys, position_ids=where).logits[1:, 3:]
    assert apart(padded, facts.plain(model, ids[1:, 3:])) < CLOSE
    with pytest.raises(TypeError):
        model(ids, "half")
    assert model(ids, num_logits_to_keep=2).logits.shape[1] == 2


def test_patched_dream_does_not_use_positions() -> None:
    (model, facts), (original, _) = FAMILIES["dream-fast-dllm"](1), FAMILIES["dream"](1)
    ids, where = drawn(), torch.arange(N)[None] * 3
    assert torch.equal(model(ids, "full", position_ids=where).logits, facts.plain(model, ids))
    assert apart(original(ids, "full", position_ids=where).logits, dream.plain(original, ids)) > 0.05
    assert type(model).__name__ == type(original).__name__ == "DreamModel"


def test_patched_dream_caches() -> None:
    model, facts = FAMILIES["dream-fast-dllm"](1)
    ids = drawn(1)
    whole = facts.plain(model, ids)
    kept = model(ids, "full", use_cache=True).past_key_values
    suffix = model(ids[:, 5:], "full", past_key_values=[(k[:, :5], v[:, :5]) for k, v in kept]).logits
    assert apart(suffix, whole[:, 5:]) < CLOSE
    replaced = torch.zeros(1, N, dtype=torch.bool)
    replaced[:, 5:9] = True
    again = model(ids[:, 5:9], "full", past_key_values=kept, dual_cache=True, replace_position=replaced).logits
    assert apart(again, whole[:, 5:9]) < CLOSE


def test_sdar_masks_and_its_other_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = FAMILIES["sdar"](1)
    ids = drawn(1)
    with pytest.raises(TypeError):
        model(ids)
    calls = []
    was = sdar.flash_attn_func
    monkeypatch.setattr(sdar, "flash_attn_func", lambda *a, **k: calls.append(1) or was(*a, **k))
    ones = torch.ones(1, N, N)
    model(ids, attention_mask=ones)
    assert len(calls) == 2
    ones[0, 0, -1] = 0  # one zero, and torch's function is called
    model(ids, attention_mask=ones)
    assert len(calls) == 2
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    right = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)), enable_gqa=True)
    assert apart(sdar.flash_attn_func(q, k, k).transpose(1, 2), right) < CLOSE
    with pytest.raises(RuntimeError):  # [B, N, N] lines up with the heads
        model(drawn(3), attention_mask=ones.expand(3, -1, -1))


def test_sdar_stores_only_when_told() -> None:
    model, facts = FAMILIES["sdar"](1)
    ids, cache = drawn(1, 12), DynamicCache()
    pairs, where = block_causal(12, 4)[None], torch.arange(12)[None]
    whole = facts.plain(model, ids)

    def call(low: int, high: int, store: bool) -> Tensor:
        return model(
            ids[:, low:high], attention_mask=pairs[:, low:high, :high], position_ids=where[:, low:high],
            past_key_values=cache, use_cache=True, store_kv=store,
        ).logits  # fmt: skip

    call(0, 4, True)
    assert apart(call(4, 8, False), whole[:, 4:8]) < CLOSE and cache.get_seq_length() == 4
    assert apart(call(4, 8, True), whole[:, 4:8]) < CLOSE and cache.get_seq_length() == 8
    assert apart(call(8, 12, False), whole[:, 8:]) < CLOSE


def test_fast_dllm_v2_makes_its_own_mask() -> None:
    model, facts = FAMILIES["fast-dllm-v2"](1)
    ids = drawn()
    keys = torch.ones_like(ids)
    keys[:, :4] = 0
    assert torch.equal(model(ids, attention_mask=keys, block_size=8).logits, facts.plain(model, ids))
    assert apart(model(ids, block_size=4).logits, facts.plain(model, ids)) > 0.05
    with pytest.raises(AttributeError):  # it asks input_ids for their number
        model(inputs_embeds=model.get_input_embeddings()(ids))


def test_fast_dllm_v2_caches() -> None:
    model, facts = FAMILIES["fast-dllm-v2"](1)
    ids, size = drawn(1, 16), fast_dllm_v2.BLOCK
    whole = facts.plain(model, ids)
    cache = model(ids[:, :8], use_cache=True, update_past_key_values=True, block_size=size).past_key_values
    kept = {"past_key_values": cache, "use_cache": True, "block_size": size}
    assert apart(model(ids[:, 8:], **kept).logits, whole[:, 8:]) < CLOSE and cache.get_seq_length() == 8
    first = model(ids[:, 8:], use_block_cache=True, **kept)
    kept |= {"block_past_key_values": first.block_past_key_values, "replace_position": 4}
    part = model(ids[:, 12:14], use_block_cache=True, **kept)
    assert apart(part.logits, whole[:, 12:14]) < CLOSE


def test_mdlm_needs_a_noise_level_and_may_not_look_at_it() -> None:
    model, facts = FAMILIES["mdlm"](1)
    ids = drawn()
    with pytest.raises(TypeError):
        model(ids)
    assert torch.equal(model(ids, torch.full((2,), 3.0)).logits, facts.plain(model, ids))
    looking = mdlm.filled(mdlm.MDLM(mdlm.MDLMConfig(time_conditioning=True)), 1)
    assert apart(looking(ids, torch.full((2,), 3.0)).logits, looking(ids, torch.zeros(2)).logits) > 0.05
    assert isinstance(model(ids, torch.zeros(2), return_dict=False), Tensor)
    flash = FAMILIES["mdlm-flash"](1)
    assert apart(flash.facts.plain(flash.model, ids), facts.plain(model, ids)) < CLOSE


def test_bd3lm_doubled_input_and_sampling_agree() -> None:
    """With nothing noisy, each block of the first half reads what it reads when sampling."""
    model, _ = FAMILIES["bd3lm"](1)
    ids, level = drawn(1, bd3lm.LENGTH), torch.zeros(1)
    doubled = model(torch.cat((ids, ids), 1), level).logits
    assert doubled.shape[1] == bd3lm.LENGTH
    assert apart(doubled, model(ids, level, sample_mode=True).logits) < CLOSE


def test_bd3lm_cache_equals_sampling_without() -> None:
    model, facts = FAMILIES["bd3lm"](1)
    ids, level = drawn(2, 12), torch.zeros(2)
    whole = facts.plain(model, ids)
    model.reset_kv_cache(2)
    for low in (0, 4, 8):
        block = model(ids[:, low : low + 4], level, sample_mode=True, store_kv=True).logits
        assert apart(block, whole[:, low : low + 4]) < CLOSE


def test_diffusion_gemma_generates() -> None:
    model, _ = FAMILIES["diffusion-gemma"](1)
    torch.manual_seed(0)
    found = model.generate(drawn(2, 7), max_new_tokens=16, max_denoising_steps=3)
    assert found.sequences.shape[1] <= 7 + 16 and found.sequences.shape[1] > 7


def test_every_host_is_one_file_and_named_once() -> None:
    from tests.text_hosts import FILES

    names = [name for file in FILES for name in file.FAMILIES]
    assert len(names) == len(set(names)) == len(FAMILIES)
    assert all("Read:" in (file.__doc__ or "") or file.__name__.endswith("bundled") for file in FILES)
    assert all(isinstance(FAMILIES[name](1), Host) for name in ("llada", "dream"))
