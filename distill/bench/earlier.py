"""Rows of an earlier run of `hasten bench distill`, so that a student who comes later does not cost everybody's samples again.

The noise, the prompts and the weights are the same in each run, so quality is, too; seconds are those of the run that a row is
of, which is why it must have been on the same machine with the same packages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hasten.pipelines.bench.earlier import check_same, opened

Row = dict[str, Any]

DECIDE = ("torch", "diffusers", "transformers")
"""Packages whose version must be the same."""


def earlier(file: Path, model: str, count: int, packages: Mapping[str, str], cpu: object) -> list[Row]:
    """The rows of `file`; packages: the versions that are installed; cpu: the name of
    this machine's processor. Raises `UsageError` where they are of another model, number of samples, machine or packages."""
    found = opened(file, "bench distill")
    was = {"model": found.get("model"), "count": found.get("count"), "cpu": found["hardware"].get("cpu")}
    was |= {name: found["versions"].get(name) for name in DECIDE}
    here = {"model": model, "count": count, "cpu": cpu} | {name: packages.get(name) for name in DECIDE}
    check_same(file, was, here)
    rows: list[Row] = found["rows"]
    return rows


def without(rows: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Earlier rows but those of whom there are new ones."""
    known = {(row["who"], row["name"], row["calls"]) for row in new}
    return [dict(row) for row in rows if (row["who"], row["name"], row["calls"]) not in known]
