"""How many drafts pay at which batch size: from sessions, or from the file of a benchmark, to a server's table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from hasten.errors import UsageError
from hasten.pipelines.decode.session import DecodeSession

LARGEST = 1024
"""Requests at once to which the last length applies; the servers go on with it."""


def of_session(session: DecodeSession) -> dict[int, int]:
    """Batch size -> the number of drafts that the session's pace asked for, the median of its last rounds. Each batch size
    has to have been generated with while the session was open."""
    asked: dict[int, list[int]] = {}
    for each in session.trace.rounds:
        asked.setdefault(each.rows, []).append(each.asked)
    return {rows: round(statistics.median(found[-64:])) for rows, found in sorted(asked.items())}


def of_file(path: Path, recipe: str) -> dict[int, int]:
    """The same from the rows that `hasten bench decode --json` wrote of `recipe`. Raises `UsageError` where it has none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no result of hasten bench decode --json: {str(error) or type(error).__name__}.") from None
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.get("recipe") == recipe and row.get("asked") is not None:
            found.setdefault(int(row["batch"]), []).append(float(row["asked"]))
    if not found:
        named = sorted({str(row["recipe"]) for row in rows if row.get("asked") is not None})
        raise UsageError(f"{path} has no row of {recipe!r} that says how many drafts it asked for. It has: {', '.join(named) or 'none'}.")
    return {batch: round(statistics.median(each)) for batch, each in sorted(found.items())}


def schedule(lengths: Mapping[int, int], most: int) -> list[list[int]]:
    """[[first, last, drafts], ...] over batch sizes from 1 on, both ends included, as vLLM's schedules are: each measured size
    speaks for those above it, too, up to the next; the smallest for all below. most: drafts at most."""
    if any(batch < 1 or length < 0 for batch, length in lengths.items()):
        raise UsageError(f"Batch sizes are 1 at least and drafts 0, got {dict(lengths)}.")
    sizes = sorted(lengths)
    begins = [1, *sizes[1:]]
    ends = [begin - 1 for begin in begins[1:]] + [max(LARGEST, sizes[-1])]
    rows: list[list[int]] = []
    for first, last, size in zip(begins, ends, sizes, strict=True):
        count = min(most, lengths[size])
        if rows and rows[-1][2] == count:
            rows[-1][1] = last
        else:
            rows.append([first, last, count])
    return rows
