"""What is sparse: prompts read less and never the future, readers read less of the cache, recipes run."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hasten.pipelines.causal.attention import attach
from hasten.pipelines.causal.site import ONCE
from hasten.pipelines.recipes import attention_text
from hasten.sparse_attn.mask import causal
from hasten.sparse_attn.scorers.spans import Depth, Near, Shards, Spans
from hasten.sparse_attn.segments import plain
from hasten.sparse_attn.stand_ins.compensate import Compensate
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.delta import Delta, Runs
from hasten.sparse_attn.text.hierarchical import Hierarchical, Tree
from hasten.sparse_attn.text.lookup import Lookup
from hasten.sparse_attn.text.reader import Reader, Recent
from hasten.sparse_attn.text.votes import Votes
from tests.pipelines.causal_models import build, close, ids, no_grad, padding, pattern  # noqa: F401

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


@pytest.mark.parametrize("name", PROMPTS)
def test_one_head_of_keys_for_all_queries(name: str) -> None:
    """One sample, one key head: what all query heads share is one plane, which must not be taken for a broadcast."""
    model, tokens = build("llama", num_key_value_heads=1), ids(1, 61)
    with attach(model, CausalAttention(prompt=PROMPTS[name], min_tokens=0)) as session:
        assert torch.isfinite(model(tokens).logits).all()
    assert session.rows[1, "prompt"].sparse == 1 and not session.reasons


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


@pytest.mark.parametrize("name", READERS)
def test_readers_of_one_head_of_keys(name: str) -> None:
    model = build("llama", num_key_value_heads=1)
    with attach(model, CausalAttention(cache=READERS[name], min_tokens=0)) as session:
        model.generate(ids(1, 61), max_new_tokens=6, do_sample=False)
    row = session.rows[2, "cache"]
    assert row.sparse == 5 and 0 < row.density < 0.7 and not session.reasons


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
