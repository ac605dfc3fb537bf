"""Tokens that deeper layers leave out, and compute when a later token needs them (LazyLLM)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.caching.decode.kept import KeptCache
from hasten.caching.decode.lazy import LazyTokens
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.decode_kv.cache import KVCache
from hasten.pipelines.decode_kv.session import attach
from hasten.recipe import Recipe
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.reader import Recent
from tests.pipelines.causal_models import build
from tests.pipelines.decode_kv.kv_contract import TEXT, generated, model, open_session, padded, steps, text

LAZY = LazyTokens(depths=(0.0, 0.4), shares=(0.6, 0.3))
"""After layer 0 of three, and after layer 1."""
PART = KeptCache(lazy=LAZY)


def heard(host: Any, layer: int, hidden: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """(queries, keys) of a Llama layer for hidden states [1, n, W] of tokens at these places: [1, H, n, D]."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    block = host.model.layers[layer]
    given, own = block.input_layernorm(hidden), block.self_attn
    q, k = (x.view(1, hidden.shape[1], -1, own.head_dim).transpose(1, 2) for x in (own.q_proj(given), own.k_proj(given)))
    cos, sin = host.model.rotary_emb(hidden, place[None])
    turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, cos, sin)
    return turned


def attended(host: Any, layer: int, hidden: Tensor, place: Tensor) -> Tensor:
    """What the last of these tokens attends to, over all heads: [n]."""
    q, k = heard(host, layer, hidden, place)
    weights = (q[:, :, -1:] @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights.sum((0, 1, 2))


def by_hand(host: Any, ids: Tensor, shares: dict[int, float]) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """(last logits, places that each layer computes, hidden states after each layer) of a prompt [1, n], with the model's own
    layers on tokens that are taken out between them."""
    hidden, place, length = host.model.embed_tokens(ids), torch.arange(ids.shape[1]), ids.shape[1]
    read, after = {}, {}
    for number, layer in enumerate(host.model.layers):
        read[number] = place
        worth = attended(host, number, hidden, place)
        given = host.model.rotary_emb(hidden, place[None])
        n = len(place)
        mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=given, position_ids=place[None])
        after[number] = hidden
        if number in shares:
            worth[-1] = torch.inf
            stay = worth.topk(int(-(-shares[number] * length // 1))).indices.sort().values
            hidden, place = hidden[:, stay], place[stay]
    return host.lm_head(host.model.norm(hidden[:, -1:])), read, after


def held(cache: KVCache, layer: int) -> list[int]:
    return sorted(cache.layers[layer].slots.place[0, 0].tolist())


def test_a_prompt_is_read_as_by_hand() -> None:
    host, ids = model(), text()
    want, read, _ = by_hand(host, ids, LAZY.after(3))
    with open_session(PART) as run:
        logits = generated(host, ids, max_new_tokens=1)[1]
        assert run.last is not None
        assert [len(held(run.last, layer)) for layer in range(3)] == [TEXT, 24, 12]
        for layer in range(3):
            assert held(run.last, layer) == read[layer].tolist()
        report = run.report()
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
    assert [row.read for row in report.layers] == [1.0, 0.6, 0.3] and report.left_bytes > 0
    assert "read 30 % of the prompt" in str(report) and "left out" in str(report)


def test_hidden_states_of_what_is_left_out_are_kept() -> None:
    host, ids = model(), text()
    _, read, after = by_hand(host, ids, LAZY.after(3))
    with open_session(PART) as run:
        generated(host, ids, max_new_tokens=1)
        assert run.last is not None and run.last.state.lazy is not None
        for layer, left in run.last.state.lazy.left.items():
            where = {int(place): number for number, place in enumerate(read[layer])}
            gone = sorted(set(read[layer].tolist()) - set(read[layer + 1].tolist()))
            assert sorted(left.place[0].tolist()) == gone
            for number, place in enumerate(left.place[0].tolist()):
                torch.testing.assert_close(left.hidden[0, number], after[layer][0, where[place]], atol=1e-4, rtol=1e-4)


def test_a_token_that_is_needed_again_is_computed_from_where_it_stopped() -> None:
    """Its key in the next layer is that of its stored hidden state at its own position, and it leaves the store."""
    host, revived = model(), 0
    with open_session(PART) as run:
        cache = run.cache(last=True)
        steps(run, cache, [text()])
        lazy = cache.state.lazy
        assert lazy is not None
        for step in range(8):
            assert cache.columns == TEXT + step
            before = {layer: (left.place[0].tolist(), left.hidden[0].clone()) for layer, left in lazy.left.items()}
            had = {layer: held(cache, layer) for layer in range(3)}
            assert steps(run, cache, [text(1, 1, seed=20 + step)]).shape[1] == 1
            for layer, (places, hidden) in before.items():
                new = sorted(set(held(cache, layer + 1)) - set(had[layer + 1]) - {TEXT + step})
                slots = cache.layers[layer + 1].slots
                assert len(held(cache, layer + 1)) == len(set(held(cache, layer + 1))), "no token twice"
                for place in set(new) & set(places):
                    own = hidden[places.index(place)][None, None]
                    want = heard(host, layer + 1, own, torch.tensor([place]))[1][0, :, 0]
                    at = slots.place[0, 0].tolist().index(place)
                    torch.testing.assert_close(slots.k[0, :, at], want, atol=1e-4, rtol=1e-4)
                    assert place not in lazy.left[layer].place[0].tolist()
                    revived += 1
        assert revived > 5
        assert sum(row.revived for row in run.report().layers) >= revived
        for layer in range(2):  # every token is somewhere: computed by the next layer, or kept for it
            everywhere = held(cache, layer + 1) + [place for at, left in lazy.left.items() if at <= layer for place in left.place[0].tolist()]
            assert sorted(everywhere) == list(range(TEXT + 8))


def test_once_everything_is_wanted_nothing_was_lost() -> None:
    """Tokens that come late are computed behind those that stood before them: with room for all from the second token on, all
    keys of the next layer are those of the whole model, as far as its inputs are."""
    ids = text()
    with open_session(KeptCache()) as run:
        whole = run.cache()
        steps(run, whole, [ids, text(1, 1, seed=3)])
    part = KeptCache(lazy=LazyTokens(depths=(0.0,), shares=(0.5,)))
    with open_session(part) as run:
        cache = run.cache(last=True)
        steps(run, cache, [ids])
        assert cache.state.lazy is not None
        cache.state.lazy.shares = {0: 0.999}
        steps(run, cache, [text(1, 1, seed=3)])
    got, want = cache.layers[1].slots, whole.layers[1].slots
    order = got.place[0, 0].argsort()
    assert got.place[0, 0][order].tolist() == list(range(TEXT + 1)) and cache.state.lazy.left[0].place.shape[1] == 0
    torch.testing.assert_close(got.k[0][:, order], want.k[0, :, : TEXT + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_with_all_shares_one_it_is_the_model(name: str) -> None:
    host, (ids, mask) = build(name), padded()
    plain = generated(host, ids, mask)
    with attach(host, KeptCache(lazy=LazyTokens(shares=(1.0, 1.0, 1.0)))) as run:
        same = generated(host, ids, mask)
        assert "Every layer computed every token" in str(run.report())
    again = generated(host, ids, mask)
    assert torch.equal(plain[1], same[1]) and torch.equal(plain[1], again[1])


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=["beams", "samples"])
def test_rows_may_change_places(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    with open_session(PART) as run, torch.no_grad():
        out = run.host.generate(text(2), max_new_tokens=8, suppress_tokens=[0], **more)
        assert out.shape[1] == TEXT + 8 and run.report().layers[2].tokens > 0


def test_a_conversation_goes_on() -> None:
    """The next turn may need what the first one left out; its own tokens are left out, too."""
    with open_session(PART) as run:
        cache = run.cache(last=True)
        steps(run, cache, [text(), text(1, 1, seed=2), text(1, 20, seed=4)])
        assert cache.lengths == [61]
        lazy = cache.state.lazy
        assert lazy is not None
        everywhere = held(cache, 2) + [place for left in lazy.left.values() for place in left.place[0].tolist()]
        assert sorted(everywhere) == list(range(61))
        cache.crop(-20)
        assert cache.lengths == [41] and all(place < 41 for left in lazy.left.values() for place in left.place[0].tolist())


def test_calls_that_want_all_logits_compute_all() -> None:
    ids = text()
    with open_session(PART) as run:
        logits = steps(run, run.cache(), [ids])
        assert "every layer computed every token" in str(run.report())
    with torch.no_grad():
        torch.testing.assert_close(logits, model()(ids).logits, atol=1e-4, rtol=1e-4)


def test_where_attention_is_not_finite_nothing_more_is_left_out() -> None:
    host = build("llama")
    with torch.no_grad():
        host.model.layers[1].self_attn.k_proj.weight[0] = float("nan")
    with attach(host, PART) as run:
        cache = run.cache(last=True)
        steps(run, cache, [text()])
        assert [len(held(cache, layer)) for layer in range(3)] == [TEXT, 24, 24]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="as many depths"):
        LazyTokens(depths=(0.5, 0.2, 0.8))
    with pytest.raises(ValueError, match="as many depths"):
        LazyTokens(depths=(0.5,), shares=(0.5, 0.2))
    with pytest.raises(ValueError, match="behind its back"):
        KeptCache(lazy=LAZY, codec=hasten.recipe("kivi").kv.codec)  # type: ignore[union-attr]
    with pytest.raises(RefusedError, match="sliding window"):
        attach(build("mistral-window"), PART)
    with pytest.raises(UsageError, match="Take one of them"):
        attach(model(), Recipe(kv=PART, attention=CausalAttention(cache=Recent(), min_tokens=0)))
    with pytest.raises(UsageError, match="drafts are several"):
        hasten.accelerate(model(), "lazy-llm+look-up")
    with open_session(PART) as run:
        cache = run.cache(last=True)
        steps(run, cache, [text()])
        with pytest.raises(UsageError, match="without drafts"):
            cache.draft(torch.ones(1, 2, 2, dtype=torch.bool).tril(), torch.arange(2)[None])
        with pytest.raises(UsageError, match="other positions"), torch.no_grad():
            run.host(text(1, 1), past_key_values=cache, position_ids=torch.tensor([[7]]))
