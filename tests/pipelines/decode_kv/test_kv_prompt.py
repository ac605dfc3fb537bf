"""Prompts of which only some tokens are read, and caches of which only some tokens are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from hasten.caching.decode.amount import Share, Tokens
from hasten.caching.decode.kept import KeptCache
from hasten.caching.decode.prompt import GemFilter
from hasten.errors import UsageError
from hasten.pipelines.decode_kv.session import attach
from hasten.recipe import Recipe
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.pages import Pages
from hasten.sparse_attn.text.reader import Recent
from hasten.sparse_attn.text.votes import Votes
from tests.pipelines.causal_models import build
from tests.pipelines.decode_kv.kv_contract import generated, model, open_session, padded, steps, text


def filtered(share: float, **more: Any) -> KeptCache:
    return KeptCache(prompt=GemFilter(amount=Share(share=share), depth=0.4), **more)


def test_a_filter_that_keeps_all_changes_nothing() -> None:
    ids, mask = padded()
    plain = generated(model(), ids, mask)
    with open_session(filtered(1.0)):
        assert torch.equal(plain[1], generated(model(), ids, mask)[1])


def test_the_model_reads_what_was_chosen_and_nothing_else() -> None:
    """The tokens that stay are a prompt by themselves, with positions from 0 on; the last one is among them."""
    host, (ids, mask) = build("llama"), padded()
    shapes: list[tuple[int, ...]] = []
    handles = [layer.mlp.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape[:2]))) for layer in host.model.layers]
    with attach(host, filtered(0.5)) as run:
        tokens, logits = generated(host, ids, mask)
        cache = run.last
    for handle in handles:
        handle.remove()
    assert cache is not None and cache.lengths == [29, 21, 25]
    assert shapes[:4] == [(3, 40), (3, 20), (3, 20), (3, 20)]
    for row in range(3):
        own = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        with attach(host, filtered(0.5)):
            alone, lone = generated(host, own)
        assert torch.equal(tokens[row : row + 1], alone)
        torch.testing.assert_close(logits[row : row + 1], lone, atol=2e-4, rtol=2e-4)


def test_a_filter_and_an_eviction_go_together() -> None:
    with open_session(filtered(0.5, amount=Tokens(count=10))) as run:
        generated(model(), text())
    assert [row.held for row in run.report().layers] == [10.0] * 3


def both(part: KeptCache, reader: Any) -> Recipe:
    return Recipe(kv=part, attention=CausalAttention(cache=reader, min_tokens=0))


@pytest.mark.parametrize("reader", [Votes(top=200, sinks=1, window=4), Pages(page=4, top=50), Recent(window=200)], ids=lambda r: r.kind)
@pytest.mark.parametrize("part", [KeptCache(), KeptCache(amount=Share(share=0.5))], ids=["all", "evicting"])
def test_readers_that_read_all_change_nothing(reader: Any, part: KeptCache) -> None:
    ids = text(2)
    with open_session(part):
        want = generated(model(), ids)[1]
    with attach(model(), both(part, reader)) as run:
        got = generated(model(), ids)[1]
        assert run.last is not None and all(layer.selected == 9 for layer in run.last.layers)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_readers_read_less_of_what_is_kept() -> None:
    """Selection on top of eviction, in drafts, too."""
    reads = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    for reader in (Recent(window=4, sinks=2), Pages(page=4, top=1, by="means", outliers=1, sinks=0), Votes(top=4, sinks=1, window=2)):
        with attach(model(), both(KeptCache(amount=Tokens(count=24)), reader)) as run:
            cache = run.cache()
            steps(run, cache, [text()])
            cache.draft(reads, torch.arange(3)[None])
            some = steps(run, cache, [text(1, 3, seed=1)])
            cache.commit(torch.arange(3)[None])
        with open_session(KeptCache(amount=Tokens(count=24))) as run:
            every = run.cache()
            steps(run, every, [text()])
            every.draft(reads, torch.arange(3)[None])
            all_ = steps(run, every, [text(1, 3, seed=1)])
        assert bool(torch.isfinite(some).all()) and not torch.allclose(some, all_, atol=1e-3)


def test_accelerate_knows_caches() -> None:
    for name in ("snapkv:tokens=12", "streaming-llm+quest:min_tokens=0", "hydragen", "kivi:residual=4"):
        with hasten.accelerate(model(), name) as run:
            generated(model(), text(1, 90))
        assert "tokens held" in str(run.report())
    with pytest.raises(UsageError, match="says something else"):
        hasten.accelerate(model(), Recipe(kv=KeptCache(), attention=CausalAttention()))
