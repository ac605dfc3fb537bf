"""Keys of low rank, values elsewhere, and readers that see landmarks alone (ShadowKV)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.caching.decode.kept import KeptCache
from hasten.caching.decode.low_rank import LowRank
from hasten.pipelines.decode_kv.session import attach
from hasten.pipelines.decode_kv.site import turns_by_halves
from hasten.recipe import Recipe
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.pages import Pages
from tests.pipelines.causal_models import build
from tests.pipelines.decode_kv.kv_contract import generated, model, steps, text


def shadow(rank: float = 1.0, top: int = 2, outliers: int = 1, packed: bool = True, near: int = 8) -> Recipe:
    """Pages of 4; without the codec the same tokens are read of a cache that holds everything as it is."""
    codec = LowRank(rank=rank, chunk=4, outliers=outliers + 1, residual=near) if packed else None
    pages = Pages(page=4, top=top, by="means", outliers=outliers, of="prompt", near=near)
    return Recipe(kv=KeptCache(codec=codec), attention=CausalAttention(cache=pages, min_tokens=0))


def logits(host: Any, recipe: Recipe, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    with attach(host, recipe):
        return generated(host, ids, mask, **more)[1]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_at_full_rank_it_is_the_choice_alone(name: str) -> None:
    host, ids = build(name), text(2, 70)
    want, got = (logits(host, shadow(packed=packed), ids) for packed in (False, True))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(want, generated(host, ids)[1], atol=1e-2), "and that is not all"


def test_with_everything_chosen_it_is_the_model() -> None:
    ids = text(2, 70)
    got = logits(model(), shadow(top=99), ids)
    torch.testing.assert_close(got, generated(model(), ids)[1], atol=2e-4, rtol=2e-4)


def test_with_padding_in_front() -> None:
    ids = text(3, 70)
    mask = (torch.arange(70) >= torch.tensor([0, 13, 39])[:, None]).long()
    ids = ids.masked_fill(mask == 0, 0)
    want, got = (logits(model(), shadow(packed=packed), ids, mask) for packed in (False, True))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_only_what_is_chosen_is_unpacked() -> None:
    """The whole store is never put together while new tokens are written."""
    with attach(model(), shadow()) as run:
        cache = run.cache()
        steps(run, cache, [text(1, 70)])
        layer = cache.layers[1]
        assert layer.slots.behind == 60 and layer.slots.used == 10 and not layer.partly
        steps(run, cache, list(text(1, 5, seed=3).split(1, 1)))
        assert layer.partly and layer.selected == 5 and layer.slots.behind == 60 and layer.slots.used == 15
        assert layer.view is None and layer.reader is not None and int(layer.reader.read) == 2 * 4 * 4


def test_lower_ranks_are_worse_and_smaller() -> None:
    ids = text(1, 90)
    want = logits(model(), shadow(packed=False), ids, max_new_tokens=2)[:, 1]
    errors, held = [], []
    for rank in (1.0, 0.5, 0.2):
        with attach(model(), shadow(rank=rank)) as run:
            errors.append(float((generated(model(), ids, max_new_tokens=2)[1][:, 1] - want).norm()))
            held.append(run.report().bytes)
    assert errors[0] < 1e-3 < errors[1] < errors[2] and held[0] > held[1] > held[2]


def test_both_memories_are_counted() -> None:
    with attach(model(), shadow(rank=0.2)) as run:
        generated(model(), text(1, 90))
        report, cache = run.report(), run.last
    assert cache is not None
    each = sum(layer.slots.behind * 2 * 8 * 4 for layer in cache.layers)
    assert report.far_bytes == each == sum(row.far_bytes for row in report.layers) > 0
    assert report.bytes == cache.bytes and "in the CPU's memory" in str(report)
    landmarks = sum(layer.reader.num_bytes() for layer in cache.layers if layer.reader is not None)
    assert report.bytes > landmarks + sum(row.bytes for row in report.layers) > landmarks > 0


def test_drafts_read_what_the_best_of_them_chose() -> None:
    ids, tree = text(1, 70), torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    found = []
    for packed in (False, True):
        with attach(model(), shadow(packed=packed)) as run:
            cache = run.cache()
            steps(run, cache, [ids])
            cache.draft(tree[None], depth=torch.tensor([[0, 1, 1]]))
            drafted = steps(run, cache, [text(1, 3, seed=8)])
            cache.commit(torch.tensor([[0, 2]]))
            found.append(torch.cat([drafted, steps(run, cache, [text(1, 1, seed=9)])], 1))
    torch.testing.assert_close(found[1], found[0], atol=2e-4, rtol=2e-4)


def test_rows_may_change_places() -> None:
    ids = text(2, 70)
    with torch.no_grad():
        outs = []
        for packed in (False, True):
            with attach(model(), shadow(packed=packed)) as run:
                outs.append(run.host.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False, suppress_tokens=[0]))
    assert torch.equal(outs[0], outs[1])


def test_a_later_turn_is_packed_by_itself_and_nothing_is_rounded_twice() -> None:
    turns = [text(1, 70), *text(1, 4, seed=2).split(1, 1), text(1, 40, seed=3), *text(1, 4, seed=4).split(1, 1)]
    found = []
    for packed in (False, True):
        with attach(model(), shadow(packed=packed)) as run:
            cache = run.cache()
            found.append(steps(run, cache, turns))
    assert cache.layers[0].slots.behind == 104
    torch.testing.assert_close(found[1], found[0], atol=5e-4, rtol=5e-4)


def test_readers_that_have_to_see_keys_read_them_all() -> None:
    """The slow way, and the same result."""
    recipe = Recipe(kv=shadow().kv, attention=CausalAttention(cache=Pages(page=4, top=3), min_tokens=0))
    plain = recipe.model_copy(update={"kv": KeptCache()})
    ids = text(1, 70)
    torch.testing.assert_close(logits(model(), recipe, ids), logits(model(), plain, ids), atol=2e-4, rtol=2e-4)


def test_how_models_turn_keys_is_found_out() -> None:
    for name in ("llama", "qwen3", "mistral-full"):
        host = build(name)
        given = host.model.rotary_emb(torch.zeros(1, 1, 32), torch.tensor([[5]]))
        assert turns_by_halves(host.model.layers[0].self_attn, given, host.config.head_dim)
        assert not turns_by_halves(host.model.layers[0].self_attn, None, 8)
        assert not turns_by_halves(torch.nn.Linear(2, 2), given, 8)


def test_the_recipe_is_both_halves() -> None:
    ids = text(1, 90)
    with hasten.accelerate(model(), "shadow-kv:rank=0.5,top=4,outliers=2,near=8") as run:
        generated(model(), ids)
    assert run.report().far_bytes > 0 and all(row.packed for row in run.report().layers)
    with hasten.accelerate(model(), "shadow-kv:rank=0.5,top=4,outliers=2,near=8+look-up") as run:
        run.host.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert "lossy: the cache" in str(run.report())
