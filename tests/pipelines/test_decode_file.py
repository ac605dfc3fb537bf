"""Rows of `hasten bench decode`, measured piece by piece: what stays, what is replaced, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hasten.errors import UsageError
from hasten.pipelines.bench.decode import Bench
from hasten.pipelines.bench.decode_file import earlier, tidy, together
from hasten.pipelines.bench.decode_ways import EVERY, PACED

PACKAGES = {"torch": "1.0", "transformers": "1.0"}
MACHINE = {"cpu": "this one", "threads": 1, "cores": 2}


def row(recipe: str = "look-up", **more: Any) -> dict[str, Any]:
    common = {"part": "drafts", "model": "m", "workload": "code", "batch": 1, "mode": "greedy", "n": 6, "repeats": 2, "drafts_when": EVERY}
    return common | {"recipe": recipe} | more


def written(folder: Path, stands: list[dict[str, Any]], **changed: Any) -> Path:
    document = {"command": "bench decode", "versions": PACKAGES, "hardware": MACHINE, "new": 64, "repeats": 3, "temperature": 0.8, "top_k": 40}
    file = folder / "decode.json"
    file.write_text(json.dumps(document | {"rows": stands} | changed))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return earlier(file, Bench(None, None, "m"), PACKAGES, MACHINE | {"cores": 1})


def test_a_new_row_takes_the_place_of_the_same_and_of_no_other() -> None:
    others = [
        row(drafts_when=PACED), row(mode="sampled"), row(batch=4), row(workload="prose"), row("medusa", student="a"), row("medusa", student="b"),
        row(repeats=0, n=48), {"part": "caches", "model": "m", "recipe": "h2o", "budget": 0.1}, {"part": "caches", "model": "m", "recipe": "h2o", "budget": 0.5},
    ]  # fmt: skip
    found = together([row(tokens=1), *others], [row(tokens=2, n=9, repeats=5)])
    assert len(found) == len(others) + 1 and all(other in found for other in others)
    assert [each for each in found if each not in others] == [row(tokens=2, n=9, repeats=5)]
    again = together(found, [row("medusa", student="a", n=7), row(n=60, repeats=0), {"part": "caches", "model": "m", "recipe": "h2o", "budget": 0.5, "kl": 1.0}])
    assert len(again) == len(found)


def test_a_peer_that_was_refused_has_one_row() -> None:
    refused = {key: value for key, value in row("pld").items() if key not in ("drafts_when", "n", "repeats")} | {"note": "no"}
    assert together([refused], [row("pld", control="peer:x")]) == [row("pld", control="peer:x")]


def test_rows_stand_cell_by_cell() -> None:
    old = [row("a", workload="noise"), row("a", batch=4), row("plain"), row("a"), {"part": "shared", "model": "synthetic", "recipe": "s", "batch": 1}]
    found = together(old, [row("b"), row("a", tokens=1), row("z", batch=4)])
    assert [(each["recipe"], each.get("workload"), each["batch"]) for each in found] == [
        ("plain", "code", 1), ("a", "code", 1), ("b", "code", 1), ("a", "code", 4), ("z", "code", 4), ("a", "noise", 1), ("s", None, 1),
    ]  # fmt: skip


def test_what_is_written() -> None:
    found = tidy(row(exact_match=1.0, exactness="exact", note=None, seconds=1.23456789, more=[0.1234567, {"x": None}]))
    assert found == row(exact_match=1.0, seconds=1.2346, more=[0.12346, {}])
    assert tidy(row(exact_match=0.5, exactness="close"))["exactness"] == "close"
    assert tidy(found) == found


def test_a_file_of_before_rows_said_their_repeats(tmp_path: Path) -> None:
    old = {key: value for key, value in row().items() if key != "repeats"}
    refused = {key: value for key, value in old.items() if key != "n"}
    assert read(written(tmp_path, [old, refused, row()])) == [row(repeats=3), refused, row()]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"new": 32}, "new 32 there, 64 here"), ({"temperature": 1.0}, "temperature"), ({"versions": PACKAGES | {"torch": "2.0"}}, "torch '2.0' there"),
        ({"hardware": MACHINE | {"threads": 2}}, "threads 2 there"), ({"rows": [row(model="other")]}, "model 'other' there"),
        ({"hardware": MACHINE | {"gpus": ["one"]}}, "gpus"),
    ],
)  # fmt: skip
def test_other_measurements_are_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match="cannot stand beside") as told:
        read(written(tmp_path, [row()], **changed))
    assert named in str(told.value)


@pytest.mark.parametrize("text", ["[]", "{", '{"command": "bench dllm"}', '{"command": "bench decode", "versions": {}, "hardware": {}, "rows": 3}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UsageError, match="is no result of hasten bench decode"):
        read(tmp_path / "other.json")
