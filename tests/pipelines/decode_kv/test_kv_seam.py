"""The seam: models of several kinds, drafts, beams, conversations, other caches, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import hasten
from hasten.caching.decode.amount import AdaptiveHeads, Pyramid, Share, Tokens
from hasten.caching.decode.codec_numbers import Int8
from hasten.caching.decode.kept import KeptCache
from hasten.caching.decode.packed import NONE
from hasten.caching.decode.score_attention import HeavyHitters, LastQueries
from hasten.errors import UsageError
from hasten.pipelines.decode_kv.attention import attend_with_lse
from hasten.pipelines.decode_kv.session import attach
from tests.pipelines.causal_models import MODELS, build
from tests.pipelines.decode_kv.kv_contract import generated, model, open_session, padded, steps, text

WINDOW = KeptCache(amount=Tokens(count=12), sinks=3)
UNEVEN = KeptCache(
    score=LastQueries(queries=6), amount=Share(share=0.4), window=4, when="prompt", layers=Pyramid(), heads=AdaptiveHeads()
)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_themselves_while_nothing_is_evicted(name: str) -> None:
    host, (ids, mask) = build(name), padded()
    plain = generated(host, ids, mask)
    with attach(host, KeptCache()):
        same = generated(host, ids, mask)
    assert torch.equal(plain[0], same[0])
    if getattr(host.config, "sliding_window", None):  # the model's own cache forgets token by token, ours in stretches
        torch.testing.assert_close(plain[1], same[1], atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(plain[1], same[1])


def test_layers_with_a_window_forget_what_is_out_of_it() -> None:
    host = build("mistral-window")
    with attach(host, KeptCache()) as run:
        cache = run.cache()
        steps(run, cache, [text(2, 200)])
        assert cache.layers[0].slots.tokens == [9.0, 9.0]


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}])
def test_ways_of_generating_are_themselves(more: dict[str, Any]) -> None:
    ids = text()
    torch.manual_seed(1)
    plain = _ids(ids, more)
    torch.manual_seed(1)
    with open_session(KeptCache()):
        same = _ids(ids, more)
    assert torch.equal(plain, same)


def _ids(ids: Tensor, more: dict[str, Any]) -> Tensor:
    call = {"max_new_tokens": 10, "do_sample": False} | more
    with torch.no_grad():
        return model().generate(ids, attention_mask=torch.ones_like(ids), **call)  # type: ignore[no-any-return]


def test_sinks_and_window_are_a_mask_on_everything() -> None:
    """Against the whole cache with a mask that says the same, step by step, at every layer."""
    ids, new, host = text(), text(1, 12, seed=9), model()
    with open_session(WINDOW) as run:
        ours = steps(run, run.cache(), [ids, *new.split(1, 1)])
    cache, want = DynamicCache(config=host.config), []
    with torch.no_grad():
        want.append(host(ids, past_key_values=cache).logits)
        for step, token in enumerate(new.split(1, 1)):
            length = ids.shape[1] + step
            seen = torch.zeros(1, 1, 1, length + 1, dtype=torch.bool)
            seen[..., :3] = True
            seen[..., length - 9 :] = True
            named = {"attention_mask": seen, "position_ids": torch.tensor([[length]])}
            want.append(host(token, past_key_values=cache, **named).logits)
    torch.testing.assert_close(ours, torch.cat(want, 1), atol=1e-5, rtol=1e-5)


def test_a_piece_of_prompt_after_an_eviction_is_read_causally() -> None:
    """Different lengths in every layer and head, several queries at once."""
    ids, turn = text(2), text(2, 5, seed=8)
    with open_session(UNEVEN) as run:
        cache = run.cache()
        steps(run, cache, [ids])
        held = [list(layer.slots.tokens) for layer in cache.layers]
        copied = copy.deepcopy([layer.slots for layer in cache.layers])
        singly = []
        for token in turn.split(1, 1):
            singly.append(steps(run, cache, [token]))
        other = run.cache()
        steps(run, other, [ids])
        at_once = steps(run, other, [turn])
    assert held[0] != held[1] and any(slots.old is not None for slots in copied)
    torch.testing.assert_close(at_once, torch.cat(singly, 1), atol=1e-4, rtol=1e-4)


TREE = [-1, 0, 0, 1, 1, 2]
"""Parents of the tokens of a draft: node 0 is the last token that was sampled."""


def ancestors() -> tuple[Tensor, Tensor]:
    reads, depth = torch.eye(len(TREE), dtype=torch.bool), torch.zeros(1, len(TREE), dtype=torch.int64)
    for node, parent in enumerate(TREE):
        if parent >= 0:
            reads[node] |= reads[parent]
            depth[0, node] = depth[0, parent] + 1
    return reads[None], depth


@pytest.mark.parametrize("part", [KeptCache(), WINDOW, UNEVEN, KeptCache(score=HeavyHitters(), amount=Tokens(count=20), recent=0.5)])
def test_an_accepted_path_is_what_one_by_one_gives(part: KeptCache) -> None:
    """Rows accept paths of different lengths; scores see accepted queries alone."""
    ids, mask = padded((40, 30))
    tree, paths = text(2, len(TREE), seed=6), [[0, 1, 4], [0, 2]]
    index = torch.tensor([[0, 1, 4], [0, 2, NONE]])
    with open_session(part) as run:
        cache = run.cache()
        steps(run, cache, [ids], mask)
        cache.draft(*ancestors())
        with torch.no_grad():
            drafted = run.host(tree, past_key_values=cache).logits
        cache.commit(index)
        assert cache.lengths == [43, 32]
        last = text(2, 1, seed=7)
        with torch.no_grad():
            after = run.host(last, past_key_values=cache).logits
        for row, path in enumerate(paths):
            alone = run.cache()
            own = ids[row : row + 1, -(40, 30)[row] :]
            steps(run, alone, [own])
            chain = tree[row : row + 1, path]
            policy_moves = part.when == "always" and part.amount is not None
            if not policy_moves:
                one = steps(run, alone, list(chain.split(1, 1)))
                torch.testing.assert_close(drafted[row : row + 1, path], one, atol=1e-4, rtol=1e-4)
            else:  # one by one, each token would evict before the next reads; in a draft all read first
                alone.draft(torch.ones(1, len(path), len(path), dtype=torch.bool).tril(), torch.arange(len(path))[None])
                steps(run, alone, [chain])
                alone.commit(torch.arange(len(path))[None])
            torch.testing.assert_close(after[row : row + 1], steps(run, alone, [last[row : row + 1]]), atol=1e-4, rtol=1e-4)


def test_a_draft_that_is_dropped_leaves_nothing() -> None:
    ids, next_ = text(), text(1, 3, seed=4)
    with open_session(WINDOW) as run:
        one, other = run.cache(), run.cache()
        steps(run, one, [ids])
        steps(run, other, [ids])
        one.draft(*ancestors())
        steps(run, one, [text(1, len(TREE), seed=2)])
        with pytest.raises(UsageError, match="open draft"):
            steps(run, one, [next_])
        one.discard()
        assert torch.equal(steps(run, one, [next_]), steps(run, other, [next_]))
        with pytest.raises(UsageError, match="no draft"):
            one.commit(torch.zeros(1, 1, dtype=torch.int64))


def test_a_call_that_fails_leaves_the_cache_as_it_was() -> None:
    ids, host = text(), build("qwen3")
    with attach(host, WINDOW) as run:
        cache, good = run.cache(), run.cache()
        for each in (cache, good):
            steps(run, each, [ids])
        layer, own = host.model.layers[2].mlp, host.model.layers[2].mlp.forward
        layer.forward = _fails
        with pytest.raises(RuntimeError, match="in the middle"):
            steps(run, cache, [text(1, 2)])
        layer.forward = own
        del layer.__dict__["forward"]
        assert cache.lengths == [40]
        # The first layers had written and evicted already; a cache that failed half-way says so.
        with pytest.raises(UsageError, match="failed"):
            steps(run, cache, [text(1, 1)])
        steps(run, good, [text(1, 1)])


def _fails(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("in the middle")


def test_a_conversation_is_compressed_turn_by_turn() -> None:
    part = KeptCache(score=LastQueries(queries=4), amount=Share(share=0.3), when="prompt", window=4)
    with open_session(part) as run:
        cache, ids, held = run.cache(), text(1, 60), []
        for turn in range(3):
            call = {"max_new_tokens": 5, "do_sample": False, "past_key_values": cache}
            with torch.no_grad():
                ids = run.host.generate(ids, attention_mask=torch.ones_like(ids), **call)
            held.append(cache.layers[0].slots.tokens[0])
            ids = torch.cat([ids, text(1, 20, seed=turn)], 1)
        assert [facts.evictions for facts in cache.state.facts] == [3] * 3
        assert held[2] < 0.45 * cache.lengths[0]


def test_other_caches_are_the_models_own() -> None:
    ids = text()
    plain = generated(model(), ids)
    with open_session(WINDOW) as run:
        cache = DynamicCache(config=model().config)
        own = generated(model(), ids, past_key_values=cache)
        without = generated(model(), ids, use_cache=False)
        assert run.notes and "the model's own" in run.notes[0]
    assert torch.equal(plain[1], own[1]) and torch.equal(plain[0], without[0])


def test_another_instance_knows_nothing_of_it() -> None:
    ids, other = text(), build("qwen3")
    plain = generated(other, ids)
    with open_session(WINDOW) as run:
        cache = run.cache()
        assert torch.equal(plain[1], generated(other, ids)[1])
        with pytest.raises(UsageError, match="did not go through it"):
            other(ids, past_key_values=cache)
        with pytest.raises(UsageError, match="accelerated already"):
            attach(model(), WINDOW)
    with pytest.raises(UsageError, match="closed"):
        run.cache()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="codecs cannot pack"):
        KeptCache(codec=Int8(), heads=AdaptiveHeads(), amount=Share())
    with open_session(WINDOW) as run:
        cache = run.cache()
        steps(run, cache, [text()])
        with pytest.raises(UsageError, match="with 2"):
            steps(run, cache, [text(2, 1)])
        mask = torch.ones(1, 1, 2, 42, dtype=torch.bool)
        with pytest.raises(UsageError, match="two dimensions"):
            run.host(text(1, 2), past_key_values=cache, attention_mask=mask)


def test_parts_merge_by_their_lse() -> None:
    """Per-head lengths, several queries: against all logits at once."""
    with open_session(UNEVEN) as run:
        cache = run.cache()
        steps(run, cache, [text(2)])
        slots = cache.layers[1].slots
    view, groups = slots.view(), 2
    q = torch.randn(2, 4, 3, view.k.shape[-1])
    out = attend_with_lse(q, view, torch.tensor([[40, 41, 42]] * 2), 0.25, None)
    seen = (view.place >= 0).repeat_interleave(groups, 1)[:, :, None]
    k, v = (x.repeat_interleave(groups, 1) for x in (view.k, view.v))
    logits = (q @ k.mT * 0.25).masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(out.lse, logits.logsumexp(-1))
    torch.testing.assert_close(out.o, logits.softmax(-1) @ v)


def test_the_report_adds_up() -> None:
    with open_session(WINDOW) as run:
        generated(model(), text(2))
        report = run.report()
    assert all(row.held + row.evicted == row.tokens == 98 for row in report.layers)
    assert report.bytes == run.last.bytes and report.share < 0.6  # type: ignore[union-attr]
    assert "evicted" in str(report) and report.to_dict()["layers"][0]["held"] == 24
    with open_session(KeptCache(amount=Tokens(count=500))) as run:
        generated(model(), text())
    assert run.report().inert and "Nothing was evicted" in str(run.report())


@pytest.mark.parametrize("second", ["minference", "look-up", "h2o:tokens=16"])
@pytest.mark.parametrize("first", ["h2o:tokens=16", "minference"])
def test_one_model_has_one_session(first: str, second: str) -> None:
    """Whatever stands on its attention, nothing is put on top of it in silence."""
    host = model()
    with hasten.accelerate(host, first), pytest.raises(UsageError, match="accelerated already"):
        hasten.accelerate(host, second)
    with hasten.accelerate(host, second):
        pass
