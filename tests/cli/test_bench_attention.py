"""`hasten bench attention`: rows with the design's keys, a gate that turns red, and refusals before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.pipelines.bench import attention as bench
from hasten.pipelines.bench import attention_parts as parts
from hasten.pipelines.bench.attention_gpu import bench_models, recipes, scaled_step
from hasten.pipelines.bench.model_shapes import MODELS, small
from hasten.sparse_attn.measure.roofline import MACHINES
from hasten.sparse_attn.measure.trial import Trial

CPU = torch.device("cpu")


def test_rows_for_every_method(hasten: Any) -> None:
    ran = hasten(
        "bench", "attention", "--tokens", 384, "--density", 0.3, "--heads", 2, "--repeats", 2, "--no-flex",
        "--device", "cpu", "--json", "made/attention.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    document = json.loads(Path("made/attention.json").read_text())
    assert document["command"] == "bench attention" and document["repeats"] == 2
    rows = {row["recipe"]: row for row in document["rows"]}
    assert list(rows) == ["sdpa", "blocks", "tiles", "tree", "clusters"]
    assert rows["sdpa"]["speedup"] == 1.0 and rows["sdpa"]["density"] == 1.0
    for name in ("blocks", "tiles", "tree", "clusters"):
        row = rows[name]
        assert row["correct"] and row["max_error"] < 1e-4 and row["n"] == 2
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"], rel=1e-3)
        assert row["planning_fraction"] == pytest.approx(row["planning_seconds"] / row["dense_seconds"], rel=0.5)
        assert row["speedup_with_planning"] < row["speedup"]
        assert 0.1 < row["density"] < 0.6 and row["density"] <= row["tile_density"] + 1e-6
        assert 0 < row["mass"] <= 1 and 0 < row["output_error"] < 1
    assert rows["blocks"]["rho"] == 1.0, "nothing stands in there, so it claims everything"
    assert "with planning" in ran.out and "clusters" in ran.out


def test_a_red_row_has_no_speed_up(monkeypatch: pytest.MonkeyPatch, hasten: Any) -> None:
    honest = Trial.attend

    def wrong(self: Trial, compensated: bool = True) -> Any:
        found = honest(self, compensated)
        found.o[..., ::3, :] *= 1.001
        return found

    monkeypatch.setattr(Trial, "attend", wrong)
    ran = hasten(
        "bench", "attention", "--tokens", 256, "--density", 0.5, "--heads", 1, "--repeats", 1, "--no-flex",
        "--method", "tree", "--device", "cpu", "--json", "-",
    )  # fmt: skip
    assert ran.code == 1 and "1 rows are red" in ran.err
    row = ran.json["rows"][1]
    assert row["correct"] is False and "speedup" not in row and row["note"].startswith("red: off by")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "cluster"), "Did you mean 'clusters'"),
        (("--density", "1.5"), "less than or equal to 1"),
        (("--device", "cuda:77"), "not available here"),
        (("--head-dim", "65", "--tokens", "128"), "Head dimension 65"),
    ],
)
def test_refused_before_any_work(hasten: Any, arguments: tuple[str, ...], words: str) -> None:
    ran = hasten("bench", "attention", "--device", "cpu", *arguments)
    assert ran.code == 2 and words in ran.err


def test_grids_are_as_cubic_as_they_can_be() -> None:
    assert parts.grid_of(4096) == (16, 16, 16)
    assert parts.grid_of(8192) == (16, 16, 32)
    assert parts.grid_of(97) == (1, 1, 97)
    for tokens in (1, 2, 360, 32_760, 75_600, 118_800):
        grid = parts.grid_of(tokens)
        assert grid[0] * grid[1] * grid[2] == tokens


def test_what_the_time_does_not_allow_is_named() -> None:
    rows = bench.bench_attention(CPU, tokens=(64, 128), seconds=1e-9, machine=MACHINES["A100"])
    assert [row["recipe"] for row in rows] == ["left out"] * 2 and all("had passed" in row["note"] for row in rows)


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    calls = {name: parts.Timed(lambda name=name: order.append(name)) for name in "ab"}  # type: ignore[misc]
    parts.take_turns(calls, CPU, 3)
    assert all(len(each.seconds) == 3 and each.inner == 20 for each in calls.values())
    assert "".join(order) == "ab" + ("a" * 20 + "b" * 20) * 3


def test_a_gate_that_passes_everything_would_be_seen() -> None:
    inputs = parts.synthetic(parts.Size(320, 16, 2), CPU, torch.float32)
    for method in bench.METHODS:
        trial = Trial(method, inputs)
        trial.choose(0.7)
        found = trial.attend()
        assert trial.error(found) < 1e-5, method.name
        other = Trial(method, inputs)
        other.choose(0.1)
        assert trial.error(other.attend()) > 1e-3, "another selection is another output"
        assert trial.error(trial.attend(compensated=False)) > 1e-3 or method.compensate is None
        found.o[..., -1, 3] = float("nan")
        assert trial.error(found) == float("inf")


@pytest.mark.parametrize("name", MODELS)
def test_networks_are_the_published_ones_and_steps_are_scaled(name: str) -> None:
    model = small(MODELS[name])
    seconds, _ = scaled_step(model, None, CPU, torch.float32, steps=2)
    assert seconds > 0
    network = model.build(model.full, CPU, torch.float32)
    assert type(network).__name__ == MODELS[name].cls
    rows = bench_models(CPU, dtype=torch.float32, machine=MACHINES["H200"], seconds=600, models=[model])
    assert [row["recipe"] for row in rows] == ["plain", *recipes()], rows
    assert all(row["seconds"] > 0 and "random weights" in row["note"] for row in rows)
    assert "planning_seconds" in rows[1] and rows[1]["predicted"] > 1
    late = bench_models(CPU, dtype=torch.float32, machine=MACHINES["H200"], seconds=-1, models=[model])
    assert late[0]["recipe"] == "left out"


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_published_sizes(name: str) -> None:
    from hasten.sparse_attn.measure.roofline import SHAPES

    model, shape = MODELS[name], SHAPES[MODELS[name].shape]
    _, frames, height, width = model.latents
    prompt = model.text[0] if model.pooled else 0  # joint attention reads it, too
    assert shape.tokens == frames * (height // 2) * (width // 2) + prompt
    assert shape.layers == sum(model.full.values()) and shape.evaluations == model.evaluations
    assert (shape.heads, shape.head_dim) == (model.config["num_attention_heads"], model.config["attention_head_dim"])


@pytest.mark.gpu
def test_on_a_gpu(hasten: Any) -> None:
    ran = hasten(
        "bench", "attention", "--device", "cuda", "--tokens", 4096, "--density", 0.2, "--heads", 2, "--repeats", 1,
        "--no-models", "--json", "-",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = ran.json["rows"]
    assert {"flash", "blocks", "clusters"} <= {row["recipe"] for row in rows}
    assert all(row["correct"] for row in rows if "correct" in row), rows
