"""The seam to causal language models: real transformers classes at tiny sizes, random weights."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicCache, StaticCache

from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines.recipes import attention_text
from hasten.pipelines.text_attention import NAME, TextSession, attach
from hasten.pipelines.text_mask import Rule, read
from hasten.pipelines.text_site import ONCE, pairs_of
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.spans import Depth, Full, Near, Shards, Spans
from hasten.sparse_attn.segments import plain
from hasten.sparse_attn.selectors.top import All
from hasten.sparse_attn.stand_ins.compensate import Compensate
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.delta import Delta, Runs
from hasten.sparse_attn.text.hierarchical import Hierarchical, Tree
from hasten.sparse_attn.text.lookup import Lookup
from hasten.sparse_attn.text.reader import Everything, Reader, Recent
from hasten.sparse_attn.text.votes import Votes

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MIXED = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2-mixed": (Qwen2ForCausalLM, Qwen2Config, MIXED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 9, "head_dim": 8}),
    "mistral-full": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 8}),
}


def build(name: str, **more: Any) -> Any:
    model, config, own = MODELS[name]
    torch.manual_seed(0)
    built = model(config(**SIZES, **own, **more)).eval()
    with torch.no_grad():
        for weight in built.parameters():  # random weights attend to nothing in particular; these do
            if weight.dim() == 2:
                weight.mul_(4)
    return built


def pattern(score: Any, layout: Any = None, **more: Any) -> SparseAttention:
    layout = layout or Identity(block=8)
    return SparseAttention(patterns=(Pattern(layout=layout, score=score, select=All()),), warm=0.0, block_m=16, **more)


def full(cache: Reader | None = None) -> CausalAttention:
    """Everything is kept, through the sparse path."""
    return CausalAttention(prompt=pattern(Spans(spans=(Full(),))), cache=cache or Recent(window=999), min_tokens=0)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str, length: int) -> Tensor:
    mask = torch.ones(3, length, dtype=torch.long)
    if side == "left":
        mask[1, :5] = mask[2, :17] = 0
    if side == "right":
        mask[1, -5:] = mask[2, -17:] = 0
    return mask


def close(ours: Tensor, dense: Tensor, real: Tensor | None = None) -> None:
    if real is not None:
        ours, dense = ours[real.bool()], dense[real.bool()]
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4 * float(dense.abs().max()))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


# --- density 1 ----------------------------------------------------------------------------------------


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


def test_attention_of_its_own_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", n_head=4, n_layer=1, hidden_size=32))
    with pytest.raises(RefusedError, match="AttentionInterface"):
        attach(model, full())


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


# --- only this instance, and everything back ------------------------------------------------------------


def test_closing_puts_everything_back() -> None:
    model, tokens = build("llama"), ids(2, 21)
    before, config = model(tokens).logits, model.config
    state = [dict(module.__dict__) for module in model.modules()]
    session = attach(model, full())
    assert model.config is not config and model.config._attn_implementation == NAME
    assert "_hasten" not in str(model.config.to_dict()), "what is saved names nothing of ours"
    model(tokens)
    session.close()
    session.close()
    assert model.config is config and config._attn_implementation == "sdpa"
    for module, own in zip(model.modules(), state, strict=True):
        assert module.__dict__.keys() == own.keys()
        assert all(value is own[name] for name, value in module.__dict__.items() if name not in ("training",))
    assert torch.equal(model(tokens).logits, before)


def test_an_exception_puts_everything_back() -> None:
    model = build("llama")
    with pytest.raises(RuntimeError, match="stop"), attach(model, full()):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"


def test_models_that_share_the_config_are_left_alone() -> None:
    model = build("llama")
    other = LlamaForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert other.config is model.config
    dense = other(ids(2, 21)).logits
    with attach(model, CausalAttention(prompt=pattern(Spans(spans=(Near(window=4),))), min_tokens=0)) as session:
        assert torch.equal(other(ids(2, 21)).logits, dense) and not session.rows
        assert not torch.allclose(model(ids(2, 21)).logits, dense)


def test_a_copy_of_an_attached_model_is_a_plain_one() -> None:
    model = build("llama")
    dense = model(ids(2, 21)).logits
    with attach(model, CausalAttention(prompt=pattern(Spans(spans=(Near(window=4),))), min_tokens=0)):
        other = copy.deepcopy(model)
    assert other.config._attn_implementation == "sdpa" and torch.equal(other(ids(2, 21)).logits, dense)


def test_eager_models_stay_eager_where_they_are_left_alone() -> None:
    model, mask = build("llama", attn_implementation="eager"), padding("left", 21)
    dense = model(ids(3, 21), attention_mask=mask, output_attentions=True)
    with attach(model, full()) as session:
        ours = model(ids(3, 21), attention_mask=mask, output_attentions=True)
    assert torch.equal(ours.logits[mask.bool()], dense.logits[mask.bool()])
    assert len(ours.attentions) == 3 and "attention weights" in session.reasons[0]
    assert model.config._attn_implementation == "eager"


# --- what is sparse ---------------------------------------------------------------------------------------

PROMPTS = {
    "near": pattern(Spans(spans=(Near(window=8, sinks=2),))),
    "shards": pattern(Spans(spans=(Shards(count=4, width=8, window=8),))),
    "hip": pattern(Hierarchical(top=2)),
    "delta": pattern(Spans(spans=(Near(window=8, sinks=4),)), Runs(share=0.3, block=8), compensate=Compensate(order=1)),
    "standing in": pattern(Spans(spans=(Near(window=8),)), compensate=Compensate(order=2)),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_sparse_prompts_read_less_and_never_the_future(name: str) -> None:
    model, tokens = build("llama"), ids(2, 61)
    dense = model(tokens).logits
    with attach(model, CausalAttention(prompt=PROMPTS[name], min_tokens=0)) as session:
        ours = model(tokens).logits
        changed = tokens.clone()
        changed[:, 40:] = ids(2, 21, seed=1)
        # Runs are cut where the keys of the whole prompt say, so what stands in for the past is not quite the same.
        if name != "delta":
            torch.testing.assert_close(model(changed).logits[:, :40], ours[:, :40], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, dense, rtol=1e-3, atol=1e-3), "else nothing was left out"
    row = session.rows[1, "prompt"]
    assert row.sparse >= 1 and 0 < row.density < 0.95 and torch.isfinite(ours).all()


def test_delta_reads_nothing_of_the_future() -> None:
    """The first layer's keys of the past do not depend on the future, and neither do runs cut by the past alone."""
    part = PROMPTS["delta"].start(0)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 48, 8, generator=g) for _ in range(3))
    def run(v: Tensor) -> Tensor:
        tokens = plain(48)
        return part.attend(q, k, v, ONCE, tokens, tokens, 0.3, lambda: q, causal(48, 48))

    other = v.clone()
    other[:, :, 30:] = 100.0
    torch.testing.assert_close(run(other)[:, :, :30], run(v)[:, :, :30])


READERS: dict[str, Reader] = {
    "recent": Recent(window=12, sinks=2),
    "votes": Votes(top=10, sinks=2, window=8),
    "lookup": Lookup(share=0.2, cluster=4),
    "tree": Tree(top=2, block=4, sinks=4, window=8),
    "delta": Delta(window=8, sinks=2),
}


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", READERS)
def test_readers_read_less_of_the_cache(name: str, side: str) -> None:
    model, tokens, mask = build("llama"), ids(3, 61), padding(side, 61)
    call = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with attach(model, CausalAttention(cache=READERS[name], min_tokens=0, dense=(Depth(end=0.3),))) as session:
        made = model.generate(tokens, **call)
    assert made.shape == (3, 67)
    assert session.rows[0, "cache"].sparse == 0 and session.rows[1, "prompt"].sparse == 0
    row = session.rows[2, "cache"]
    if name == "delta" and side == "left":  # reads everything of padded batches
        assert row.density == 1
    else:
        assert row.sparse == 5 and 0 < row.density < 0.7


def test_states_belong_to_caches() -> None:
    """Two sequences that take turns do not see each other's prompt."""
    model, policy = build("llama"), CausalAttention(cache=Lookup(share=0.3, cluster=4), min_tokens=0)
    prompts = [ids(1, 40, seed=1), ids(1, 40, seed=2)]

    def turn(cache: DynamicCache, token: Tensor) -> Tensor:
        logits: Tensor = model(token, past_key_values=cache).logits[:, -1:]
        return logits

    def alone(prompt: Tensor) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        return [turn(cache, prompt), *(turn(cache, prompt[:, :1]) for _ in range(3))]

    with attach(model, policy):
        expected = [alone(prompt) for prompt in prompts]
        caches = [DynamicCache(config=model.config) for _ in prompts]
        found: list[list[Tensor]] = [[turn(cache, prompt)] for cache, prompt in zip(caches, prompts, strict=True)]
        for _ in range(3):
            for own, cache, prompt in zip(found, caches, prompts, strict=True):
                own.append(turn(cache, prompt[:, :1]))
    for own, truth in zip(found, expected, strict=True):
        for ours, solo in zip(own, truth, strict=True):
            assert torch.equal(ours, solo)


def test_states_die_with_their_cache() -> None:
    model = build("llama")
    with attach(model, CausalAttention(cache=Lookup(cluster=4), min_tokens=0)) as session:
        model.generate(ids(1, 30), max_new_tokens=3, do_sample=False)
        gc.collect()
        assert [len(site.readers) for site in session.sites] == [0, 0, 0]


# --- what is refused, and said -------------------------------------------------------------------------------


def because(session: TextSession, reason: str) -> None:
    assert any(reason in said for said in session.reasons), session.reasons
    assert not any(row.sparse for row in session.rows.values())


def test_masks_of_another_kind_are_the_models_own() -> None:
    model, tokens = build("llama"), ids(1, 24)
    prefix = torch.ones(24, 24, dtype=torch.bool).tril()
    prefix[:9, :9] = True
    dense = model(tokens, attention_mask=prefix[None, None]).logits
    with attach(model, full()) as session:
        assert torch.equal(model(tokens, attention_mask=prefix[None, None]).logits, dense)
    because(session, "mask")


def test_packed_sequences_are_the_models_own() -> None:
    model, tokens = build("llama"), ids(1, 24)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    dense = model(tokens, position_ids=positions, use_cache=False).logits
    with attach(model, full()) as session:
        assert torch.equal(model(tokens, position_ids=positions, use_cache=False).logits, dense)
    because(session, "mask")


def test_gradients_and_dropout_are_the_models_own() -> None:
    model = build("llama", attention_dropout=0.5)
    with attach(model, full()) as session, torch.enable_grad():
        model(ids(1, 24)).logits.sum().backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
        because(session, "gradients")
        model.train()
        model(ids(1, 24))
        because(session, "drops out")


def test_soft_caps_are_the_models_own() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=5.0, sliding_window=9)).eval()
    dense = model(ids(2, 24)).logits
    with attach(model, full()) as session:
        close(model(ids(2, 24)).logits, dense)
    because(session, "softcap")


def test_a_session_that_did_nothing_says_so() -> None:
    model = build("llama")
    with pytest.warns(UserWarning, match="did nothing"), attach(model, CausalAttention(cache=Recent())):
        model.generate(ids(1, 9), max_new_tokens=2, do_sample=False)


def test_mistakes_say_what_fits() -> None:
    with pytest.raises(ModelError, match="not a transformers model"):
        attach(torch.nn.Linear(2, 2), full())
    model = build("llama")
    with attach(model, full()), pytest.raises(UsageError, match="attached already"):
        attach(model, full())
    with pytest.raises(ModelError, match="no causal self-attention"):
        attach(model.model.rotary_emb if isinstance(model.model.rotary_emb, type(model)) else _embedder(), full())


def _embedder() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    )


@pytest.mark.parametrize("left", [None, 0, 3, 30])
@pytest.mark.parametrize("offset", [0, 2, 7])
def test_pairs_of_a_mask_are_counted(left: int | None, offset: int) -> None:
    mask = Mask(left=left, right=0, offset=offset)
    allowed = mask.allowed(torch.arange(11), torch.arange(11 + offset), 11 + offset)
    assert pairs_of(mask, 11) == int(allowed.sum())


RECIPES = {
    name: make
    for name, make in vars(attention_text).items()
    if getattr(make, "__module__", "") == attention_text.__name__ and not name.startswith("_")
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_text_recipe_runs(name: str) -> None:
    """At its own settings, whose windows hold all of a short prompt."""
    model, tokens = build("llama"), ids(2, 150)
    dense = model(tokens).logits
    policy = RECIPES[name]().attention.model_copy(update={"min_tokens": 0})
    with attach(model, policy) as session:
        made = model.generate(tokens, max_new_tokens=3, do_sample=False)
        close(model(tokens).logits, dense)
    assert made.shape == (2, 153) and any(row.sparse for row in session.rows.values()) and not session.reasons


# --- masks as rules ---------------------------------------------------------------------------------------------


def causal_mask(n: int, s: int, offset: int, window: int | None = None) -> Tensor:
    i, j = torch.arange(n)[:, None] + offset, torch.arange(s)[None]
    found = j <= i
    return (found if window is None else found & (j > i - window))[None, None]


def test_rules_of_masks() -> None:
    assert read(None, 2, 1, 9, None) == Rule(8, 9) and read(None, 2, 5, 9, None) == Rule(0, 5)
    assert read(causal_mask(5, 9, 0), 1, 5, 9, None) == Rule(0, 5), "a static cache has room"
    assert read(causal_mask(5, 9, 2), 1, 5, 9, None) == Rule(2, 7)
    assert read(causal_mask(9, 9, 0, 4), 1, 9, 9, 4) == Rule(0, 9, window=4)
    assert read(causal_mask(9, 9, 0), 1, 9, 9, 4) == Rule(0, 9), "the mask says whether the window holds"
    left = causal_mask(9, 9, 0).repeat(2, 1, 1, 1)
    left[1, :, :, :3] = False
    assert read(left, 2, 9, 9, None) == Rule(0, 9, (0, 3), (9, 9))
    right = causal_mask(9, 9, 0).repeat(2, 1, 1, 1)
    right[0, :, :, 6:] = False
    assert read(right, 2, 9, 9, None) == Rule(0, 9, (0, 0), (6, 9))
    assert read(causal_mask(9, 9, 0, 4), 3, 9, 9, 4) == Rule(0, 9, window=4), "one mask for all samples"


def test_rules_of_drafts() -> None:
    mask = causal_mask(3, 9, 5).repeat(2, 1, 1, 1)
    mask[:, 0, 2, 6] = False  # places 5 to 7 are the draft's; the last reads the first, not the second
    rule = read(mask, 2, 3, 9, None)
    assert rule is not None and rule.tree is not None and rule.tree.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert (rule.offset, rule.end, rule.first) == (5, 8, None)
    mask[1, 0, 2, 6] = True
    assert read(mask, 2, 3, 9, None) is None, "another tree in each sample"
    mask[1, 0, 2, 6] = mask[:, 0, 1, 3] = False
    assert read(mask, 2, 3, 9, None) is None, "something of the past is left out"


@pytest.mark.parametrize("place", [(3, 7), (8, 0), (5, 5)])
def test_one_element_makes_it_another_mask(place: tuple[int, int]) -> None:
    mask = causal_mask(9, 9, 0)
    mask[0, 0, place[0], place[1]] ^= True
    assert read(mask, 1, 9, 9, None) is None
    assert read(mask.float(), 1, 9, 9, None) is None and read(mask, 1, 9, 8, None) is None
