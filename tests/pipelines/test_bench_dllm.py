"""The benchmark of text diffusion on a tiny model: rows, refusals, bars."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.errors import RecipeError
from hasten.pipelines.bench import dllm as bench_dllm
from hasten.pipelines.bench.dllm import Bench, Workload, table
from hasten.pipelines.bench.dllm_bars import bars
from tests.text_models import prompts, tiny_llama


class Words:
    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def run(names: list[str]) -> list[dict[str, Any]]:
    lengths = [9, 6, 11]
    work = Workload("random", prompts(lengths), [12, 9, 5], ["code"] * 3, None)
    return table(Bench(tiny_llama(), Words(), batch=2), work, names, "tiny")


def test_rows_and_refusals() -> None:
    rows = {row["recipe"]: row for row in run(["fast-dllm", "text-exact", "freedave+echo-cache"])}
    assert rows["sequential"]["agreement"] == 1 and rows["sequential"]["of_sequential"] == 1
    assert rows["oracle"]["agreement"] == 1 and rows["oracle"]["nfe"] <= rows["sequential"]["nfe"]
    assert rows["text-exact"]["agreement"] == 1
    assert rows["fast-dllm"]["token_layers"] < rows["sequential"]["token_layers"]
    assert "drafts" in rows["freedave+echo-cache"]["note"] and "nfe" not in rows["freedave+echo-cache"]


def test_an_unknown_recipe_stops_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match="dual-cashe"):
        run(["sequential+dual-cashe"])


def test_bars_are_arithmetic_on_rows() -> None:
    row = {"agreement": 1.0, "exact_match": 0.9, "nfe": 4.0, "token_layers": 100.0}
    rows = [
        row | {"recipe": "sequential", "nfe": 16.0, "token_layers": 900.0},
        row | {"recipe": "oracle", "nfe": 2.0},
        row | {"recipe": "fast-dllm", "exact_match": 0.5, "token_layers": 160.0},
        row | {"recipe": "text-fast", "exact_match": 0.89},
        row | {"recipe": "text-balanced", "exact_match": 0.896, "nfe": 3.5},
        row | {"recipe": "text-exact", "agreement": 0.99, "token_layers": 500.0},
    ]
    less, near, exact = bars(rows, bench_dllm.OURS, ["text-exact"])
    assert less.met is True and "1.60x (text-balanced" in less.detail
    assert near.met is False and "1.75x (text-balanced" in near.detail
    assert exact.met is False
