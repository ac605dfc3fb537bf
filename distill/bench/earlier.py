"""Rows of an earlier run of `hasten bench distill`, so that a student who comes later does not cost everybody's samples again.

The noise, the prompts and the weights are the same in each run, so quality is, too; seconds are those of the run that a row is
of, which is why it must have been on the same machine with the same packages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hasten.errors import UsageError

Row = dict[str, Any]

DECIDE = ("torch", "diffusers", "transformers")
"""Packages whose version must be the same."""


def earlier(file: Path, model: str, count: int, packages: Mapping[str, str], cpu: object) -> list[Row]:
    """The rows of `file`; packages: the versions that are installed; cpu: the name of
    this machine's processor. Raises `UsageError` where they are of another model, number of samples, machine or packages."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        was = {"model": found["model"], "count": found["count"], "cpu": found["hardware"].get("cpu")}
        was |= {name: found["versions"].get(name) for name in DECIDE}
        rows: list[Row] = found["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"'{file}' is no result of hasten bench distill ({error}). Give the file that its --json wrote.") from error
    here = {"model": model, "count": count, "cpu": cpu} | {name: packages.get(name) for name in DECIDE}
    if odd := [f"{name} {was[name]!r} there, {here[name]!r} here" for name in here if was[name] != here[name]]:
        raise UsageError(f"The rows of '{file}' cannot stand beside new ones: {'; '.join(odd)}. Leave --onto out, and measure all again.")
    return rows


def without(rows: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Earlier rows but those of whom there are new ones."""
    known = {(row["who"], row["name"], row["calls"]) for row in new}
    return [dict(row) for row in rows if (row["who"], row["name"], row["calls"]) not in known]
