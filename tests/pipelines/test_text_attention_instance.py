"""Only this instance is touched, everything is put back, and what cannot be right is left alone, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines.causal.attention import NAME, attach
from hasten.sparse_attn.scorers.spans import Near, Spans
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.reader import Recent
from tests.pipelines.causal_models import SIZES, because, build, close, full, ids, no_grad, padding, pattern  # noqa: F401


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


# --- what is left to the model, and said ------------------------------------------------------------------


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
    with attach(model, full()), pytest.raises(UsageError, match="accelerated already"):
        attach(model, full())
    with pytest.raises(ModelError, match="no causal self-attention"):
        attach(model.model.rotary_emb if isinstance(model.model.rotary_emb, type(model)) else _embedder(), full())


def _embedder() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    )


def test_attention_of_its_own_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", n_head=4, n_layer=1, hidden_size=32))
    with pytest.raises(RefusedError, match="AttentionInterface"):
        attach(model, full())
