"""Rows of `hasten bench decode` that were measured piece by piece, in one file.

A row is known by where and how it was measured; a new one takes the place of the old one. A row whose tokens were only counted
stands beside one of fewer texts that was timed. Numbers are kept to five digits, which is more than any of them is good for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.pipelines.bench.decode import Bench
from hasten.pipelines.bench.decode_texts import WORKLOADS
from hasten.pipelines.bench.decode_ways import EVERY
from hasten.pipelines.bench.earlier import check_same, opened

Row = dict[str, Any]

COMMAND = "bench decode"
PARTS = ("drafts", "caches", "shared")
DECIDE = ("torch", "transformers")
"""Packages whose version must be the same."""

MACHINE = ("cpu", "threads", "gpus")
DIGITS = 5

IDENTITY = (
    "part", "model", "recipe", "student", "workload", "batch", "mode", "budget", "prefix", "suffix", "heads", "key_heads", "dim", "dtype",
)  # fmt: skip
"""Keys that say what a row is of, beside when drafts are made, and whether anything was timed."""


def earlier(file: Path, bench: Bench, packages: Mapping[str, str], machine: Mapping[str, Any]) -> list[Row]:
    """The rows of `file`. packages: installed versions; machine: as `hardware` of a result has it.

    Raises `UsageError` for another command's file, and where the rows are of another model, machine, version of torch or
    transformers, or other lengths or laws than new ones would be.
    """
    found = opened(file, COMMAND)
    rows: list[Row] = found["rows"]
    own = {"new": bench.new, "temperature": bench.temperature, "top_k": bench.top_k}
    there = {key: found.get(key) for key in own} | {"model": next((row["model"] for row in rows if row["part"] != "shared"), bench.name)}
    there |= {key: found["hardware"].get(key) for key in MACHINE} | {key: found["versions"].get(key) for key in DECIDE}
    here = own | {"model": bench.name} | {key: machine.get(key) for key in MACHINE} | {key: packages.get(key) for key in DECIDE}
    check_same(file, there, here)
    # files of before rows said so themselves
    return [row if "repeats" in row or row["part"] != "drafts" or not row.get("n") else row | {"repeats": found["repeats"]} for row in rows]


def together(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The rows of both: new ones in the place of old ones of the same, part by part and cell by cell."""
    rows = {_identity(row): row for row in old} | {_identity(row): row for row in map(tidy, new)}
    return sorted(rows.values(), key=_place)


def tidy(row: Mapping[str, Any]) -> Row:
    """A row as it is written: without what says nothing, and without a sentence on exactness where all texts are exact."""
    kept = {key: _rounded(value) for key, value in row.items() if value is not None}
    if kept.get("exact_match", 1.0) == 1.0:
        kept.pop("exactness", None)
    return kept


def _identity(row: Row) -> tuple[object, ...]:
    return (*map(row.get, IDENTITY), row.get("drafts_when", EVERY), row.get("repeats") == 0)


def _place(row: Row) -> tuple[int, int, int, str]:
    works: Sequence[str] = list(WORKLOADS)
    work = row.get("workload", "")
    return (
        PARTS.index(row["part"]), works.index(work) if work in works else len(works),
        row["batch"] if row["part"] == "drafts" else 0, row.get("mode", ""),
    )  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items() if each is not None}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
