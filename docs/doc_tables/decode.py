"""`hasten bench decode`: the bars, and what each way of drafting gives."""

from __future__ import annotations

from doc_tables.results import (
    VERDICT,
    Columns,
    Row,
    below_each_other,
    documents,
    hardware_and_versions,
    known,
    percent,
    table,
    times,
)

COLUMNS: Columns = {
    "tokens_per_forward": ("tokens per forward", lambda value: f"{value:.2f}"),
    "drafts": ("drafts per forward", lambda value: f"{value:.1f}"),
    "speedup_processor": ("speed-up, processor", times),
    "speedup": ("wall", times),
    "exact_match": ("same texts", percent),
}


def bars() -> str:
    """One row per bar and model."""
    rows = [
        [f"`{document['rows'][0]['model']}`", str(bar["bar"]), f"{VERDICT[bar['met']]}: {bar['detail']}"]
        for _, document in documents("decode")
        for bar in document["bars"]
    ]
    return table(["model", "bar", "met"], rows, left=3)


def decode() -> str:
    """All rows with drafts, a table for each kind of prompt, batch size and mode."""
    parts = []
    for file, document in documents("decode"):
        rows: list[Row] = [row for row in document["rows"] if row["part"] == "drafts"]
        where = hardware_and_versions(document, file)
        for place in dict.fromkeys((row["workload"], row["batch"], row["mode"]) for row in rows):
            mine = [row for row in rows if (row["workload"], row["batch"], row["mode"]) == place]
            parts.append(_cell(mine, f"### `{mine[0]['model']}`, {place[0]}, {place[2]}, {place[1]} at once", where))
    return below_each_other(parts)


def _cell(rows: list[Row], title: str, where: str) -> str:
    """One table: what was measured by falling tokens per forward, then what was refused, once for each reason."""
    measured = sorted((row for row in rows if row.get("n")), key=lambda row: -row["tokens_per_forward"])
    body = table(
        ["recipe", "drafts", *(heading for heading, _ in COLUMNS.values())],
        [[_name(row), str(row.get("drafts_when", "")), *(known(row, key, COLUMNS) for key in COLUMNS)] for row in measured],
        left=2,
    )
    refused: dict[str, list[str]] = {}
    for row in rows:
        if not row.get("n"):
            refused.setdefault(str(row["note"]), []).append(_name(row))
    reasons = "".join(f"- {', '.join(dict.fromkeys(names))}: {note}\n" for note, names in refused.items())
    texts = f"{measured[0]['n']} texts; {where}" if measured else where
    return f"{title}\n{texts}\n\n{body}" + (f"\nNot run:\n\n{reasons}" if reasons else "")


def _name(row: Row) -> str:
    return str(row["recipe"]) if row.get("control") or row["recipe"] == "plain" else f"`{row['recipe']}`"
