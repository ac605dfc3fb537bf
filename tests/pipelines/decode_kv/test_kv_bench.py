"""The benchmark's rows: the whole cache is itself, policies are worse, shared prefixes are exact."""

from __future__ import annotations

import pytest

from hasten.caching.decode.kept import KeptCache
from hasten.pipelines import tiny_models
from hasten.pipelines.decode_kv import bench, bench_shared
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.pages import Pages


def test_rows_of_policies() -> None:
    model, tokenizer = tiny_models.text("tiny-lm")
    rows = bench.table(
        model, tokenizer, count=2, given=60, new=8, names=("streaming-llm", "random-kv"), shares=(0.25,), packing=("int8-kv",)
    )
    full, window, lot, int8 = rows
    assert full["kl"] == 0 and full["agreement"] == 1 and full["letters"] > 0.95
    assert 0 < window["kl"] and 0 < lot["kl"] and window["bytes_share"] < 0.4
    assert 0 < int8["kl"] < 0.02 < window["kl"] and int8["letters"] > 0.9 > lot["letters"]


@pytest.mark.parametrize("name", bench.READING)
def test_what_readers_read_is_a_share_of_the_prompt(name: str) -> None:
    recipe = bench.budgeted(name, 0.25, 192)
    assert isinstance(recipe.kv, KeptCache) and isinstance(recipe.attention, CausalAttention)
    pages = recipe.attention.cache
    assert isinstance(pages, Pages) and (pages.top + pages.outliers + pages.sinks) * pages.page == 48


def test_shared_prefixes_are_measured_on_equal_outputs() -> None:
    row = bench_shared.attention(batch=4, prefix=256, suffix=8, heads=4, key_heads=2, dim=16, rounds=1)
    assert row["largest_difference"] < 1e-5 and row["bytes_shared"] < row["bytes_separate"] / 2
    model, tokenizer = tiny_models.text("tiny-lm")
    prompt = bench.code(tokenizer, 1, 40, 1).prompts
    assert bench_shared.generation(model, prompt, samples=3, new=4, rounds=1)["same"]
