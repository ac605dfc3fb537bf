"""`hasten bench distill`: every row, and the bars."""

from __future__ import annotations

from typing import Any

from doc_tables.results import (
    VERDICT,
    Columns,
    Row,
    below_each_other,
    documents,
    hardware_and_versions,
    known,
    table,
)

WHO = {"teacher": "teacher", "solver": "no training", "student": "student", "recipe": "bundled student"}

COLUMNS: Columns = {
    "evaluations": ("evaluations", lambda value: f"{round(value, 2):g}"),
    "frechet": ("Frechet", lambda value: f"{value:.1f}"),
    "sliced": ("sliced W2", lambda value: f"{value:.3f}"),
    "recall": ("recall", lambda value: f"{value:.3f}"),
    "precision": ("precision", lambda value: f"{value:.3f}"),
    "accuracy": ("accuracy", lambda value: f"{value:.3f}"),
    "seconds": ("s each", lambda value: f"{value:.3f}"),
    "training_seconds": ("training, CPU s", lambda value: f"{value:.0f}"),
    "peak_bytes": ("peak memory", lambda value: f"{value / 2**30:.2f} GiB"),
}

TEXT_COLUMNS: Columns = {
    "evaluations": ("evaluations of an answer", lambda value: f"{value:.2f}"),
    "tokens_per_evaluation": ("tokens of an evaluation", lambda value: f"{value:.2f}"),
    "exact_match": ("exact match", lambda value: f"{value:.1%}"),
}


def bars() -> str:
    """One row per bar and model."""
    rows = [
        [f"`{document['model']}`", str(bar["bar"]), f"{VERDICT[bar['met']]}: {bar['detail']}"]
        for _, document in documents("distill")
        for bar in document["bars"]
    ]
    return table(["model", "bar", "met"], rows, left=3)


def distill() -> str:
    """All rows by calls, a table for each model: teacher, the best solver of each number of steps, students."""
    parts = []
    for file, document in documents("distill"):
        rows: list[Row] = [row for row in document["rows"] if "frechet" in row]
        if not rows:
            continue  # of texts
        body = table(
            ["who", "calls", "what is trained", *(heading for heading, _ in COLUMNS.values())],
            [[*_label(row), *(known(row, key, COLUMNS) for key in COLUMNS)] for row in _chosen(rows)],
            left=3,
        )
        where = hardware_and_versions(document, file)
        parts.append(f"### `{document['model']}`\n{document['count']} samples each; {where}\n\n{body}")
    return below_each_other(parts)


def texts() -> str:
    """The rows of text models: evaluations and exact match, or tokens of a verified evaluation."""
    parts = []
    for file, document in documents("distill"):
        rows: list[Row] = [row for row in document["rows"] if "frechet" not in row and row["who"] in ("teacher", "student")]
        if len(rows) < len(document["rows"]):
            continue
        present = {key: column for key, column in TEXT_COLUMNS.items() if any(key in row for row in rows)}
        body = table(
            ["who", "recipe", *(heading for heading, _ in present.values())],
            [[f"{row['who']} `{row['name']}`", row.get("recipe", ""), *(known(row, key, present) for key in present)] for row in rows],
            left=2,
        )
        parts.append(f"### `{document['model']}`\n{document['count']} questions of each task; {hardware_and_versions(document, file)}\n\n{body}")
    return below_each_other(parts)


def _chosen(rows: list[Row]) -> list[Row]:
    """Everybody but solvers that another one beats at the same number of steps."""
    kept = []
    for row in rows:
        same = [r["frechet"] for r in rows if r["who"] == row["who"] == "solver" and r["calls"] == row["calls"]]
        if row["who"] != "solver" or row["frechet"] == min(same):
            kept.append(row)
    order = list(WHO)
    return sorted(kept, key=lambda row: (order.index(row["who"]), str(row["name"]) if row["who"] == "student" else "", row["calls"]))


def _label(row: Row) -> list[Any]:
    trained = f"{row['method']}, {row['weights']}, {row['steps']} x {row['batch']}" if row.get("method") else ""
    if row.get("begins_with"):
        trained += f", after `{row['begins_with']}`"
    at = f"{row['calls']}{' (trained for)' if row.get('trained_for') == row['calls'] else ''}"
    return [f"{WHO[row['who']]} `{row['name']}`", at, trained]
