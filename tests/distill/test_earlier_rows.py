"""Rows of an earlier contest stand beside new ones where they would be the same today, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hasten.distill.bench.earlier import DECIDE, earlier, without
from hasten.errors import UsageError

PACKAGES = dict.fromkeys(DECIDE, "1.0")
ROWS = [{"who": "teacher", "name": "its own solver", "calls": 50}, {"who": "student", "name": "run", "calls": 4}]


def written(folder: Path, **changed: Any) -> Path:
    document = {"model": "tiny-video", "count": 64, "versions": PACKAGES, "hardware": {"cpu": "this one", "cores": 2}, "rows": ROWS} | changed
    file = folder / "earlier.json"
    file.write_text(json.dumps(document))
    return file


def test_rows_of_the_same_run_are_kept_but_for_the_new_ones(tmp_path: Path) -> None:
    rows = earlier(written(tmp_path), "tiny-video", 64, PACKAGES, "this one")
    assert rows == ROWS
    assert without(rows, [{"who": "student", "name": "run", "calls": 4}]) == ROWS[:1]
    assert without(rows, [{"who": "student", "name": "run", "calls": 1}]) == ROWS


@pytest.mark.parametrize(
    "changed",
    [{"model": "tiny-image"}, {"count": 32}, {"versions": PACKAGES | {"torch": "2.0"}}, {"hardware": {"cpu": "another"}}, {"count": None}],
    ids=["model", "count", "versions", "machine", "nothing"],
)
def test_others_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot stand beside"):
        earlier(written(tmp_path, **changed), "tiny-video", 64, PACKAGES, "this one")


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    for file in (tmp_path / "other.json", tmp_path / "none.json"):
        with pytest.raises(UsageError, match="is no result of hasten bench distill"):
            earlier(file, "tiny-video", 64, PACKAGES, "this one")
