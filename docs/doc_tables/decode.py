"""`hasten bench decode`: the bars, what drafts are worth in every round, and what they save where they are made when they pay."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from doc_tables.results import VERDICT, Row, below_each_other, documents, hardware_and_versions, table, times

PACED, NOISE = "goodput", "noise"


def bars() -> str:
    """One row per bar and model."""
    rows = [
        [f"`{document['rows'][0]['model']}`", str(bar["bar"]), f"{VERDICT[bar['met']]}: {bar['detail']}"]
        for _, document in documents("decode")
        for bar in document["bars"]
    ]
    return table(["model", "bar", "met"], rows, left=3)


def decode() -> str:
    """Two kinds of tables for each model: tokens per forward, one text at a time; and speed-ups for each batch size."""
    parts = []
    for file, document in documents("decode"):
        rows: list[Row] = [row for row in document["rows"] if row["part"] == "drafts"]
        where = f"{rows[0]['model']}; {hardware_and_versions(document, file)}"
        for mode in dict.fromkeys(row["mode"] for row in rows):
            mine = [row for row in rows if row["mode"] == mode and row["batch"] == 1 and not row.get("adverse") and row.get("drafts_when") != PACED]
            parts.append(f"### Tokens per forward, drafting in every round, {mode}\n{where}\n\n{_forwards(mine)}")
        for mode in dict.fromkeys(row["mode"] for row in rows):
            mine = [row for row in rows if row["mode"] == mode and (row.get("drafts_when") == PACED or row.get("control"))]
            timed = [row for row in mine if row.get("speedup_processor") is not None]
            parts.append(f"### Speed-ups where drafts are made when they pay, {mode}\n{where}\n\n{_speeds(timed)}")
        parts += [_students(rows), _refused(rows)]
    return below_each_other([part for part in parts if part])


def _forwards(rows: Sequence[Row]) -> str:
    """A line for each recipe and peer, the most tokens first; how many drafts a forward read is behind them."""
    return _lines(rows, [(str(row["workload"]),) for row in rows], lambda row: f"{row['tokens_per_forward']:.2f} ({row['drafts']:.1f})", "tokens_per_forward")


def _speeds(rows: Sequence[Row]) -> str:
    """A line for each recipe and peer, the largest first."""
    return _lines(rows, [(str(row["workload"]), str(row["batch"])) for row in rows], lambda row: times(row["speedup_processor"]), "speedup_processor")


def _lines(rows: Sequence[Row], places: Sequence[tuple[str, ...]], told: Callable[[Row], str], key: str) -> str:
    """places: the column of each row; those of noise come last. Of rows for one cell of the table, that of the most texts is told.
    A column says on how many texts its rows are, and a cell that is on another number says that."""
    measured = [(row, place) for row, place in zip(rows, places, strict=True) if row.get("n")]
    columns = sorted(dict.fromkeys(place for _, place in measured), key=lambda place: place[0] == NOISE)
    lines: dict[str, dict[tuple[str, ...], Row]] = {}
    for row, place in sorted(measured, key=lambda each: each[0]["n"]):
        lines.setdefault(_name(row), {})[place] = row
    ordered = sorted(lines.items(), key=lambda line: -sum(row[key] for row in line[1].values()) / len(line[1]))
    counts = {place: statistics.mode(found[place]["n"] for found in lines.values() if place in found) for place in columns}

    def cell(found: dict[tuple[str, ...], Row], place: tuple[str, ...]) -> str:
        if place not in found:
            return ""
        row = found[place]
        return told(row) if row["n"] == counts[place] else f"{told(row)}, {row['n']} texts"

    return table(
        ["recipe", *(f"{' x '.join(place)}, {counts[place]} texts" for place in columns)],
        [[name, *(cell(found, place) for place in columns)] for name, found in ordered],
    )


def _students(rows: Sequence[Row]) -> str:
    """How long those were trained that were."""
    told = [f"- {_name(row)}: {row['training']}" for row in rows if row.get("training")]
    return "\n".join(["Trained:", "", *dict.fromkeys(told)]) + "\n" if told else ""


def _refused(rows: Sequence[Row]) -> str:
    """What was not run, once for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row.get("n"):
            reasons.setdefault(str(row["note"]), []).append(_name(row))
    told = [f"- {', '.join(dict.fromkeys(names))}: {note}" for note, names in reasons.items()]
    return "\n".join(["Not run:", "", *told]) + "\n" if told else ""


def _name(row: Row) -> str:
    if row.get("control") or row["recipe"] == "plain":
        return str(row["recipe"])
    return f"`{row['recipe']}`" + (f" of {row['student']}" if row.get("student") else "")
