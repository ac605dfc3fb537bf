"""`benchmarks/tune_text.py`: the tuned recipe for texts beside every single method, on questions that nobody tuned on."""

from __future__ import annotations

from doc_tables.results import (
    Columns,
    below_each_other,
    documents,
    hardware_name,
    known,
    percent,
    table,
    tenths_of_percent,
    times,
)

COLUMNS: Columns = {
    "speedup": ("speed-up", times),
    "of_sequential": ("of the work", percent),
    "nfe": ("evaluations a text", lambda value: f"{value:.1f}"),
    "agreement": ("as sequential decoding", tenths_of_percent),
    "exact_match": ("right answers", tenths_of_percent),
    "n": ("texts", str),
}


def text_tuning() -> str:
    """The rows that keep the budget, fastest first; the others in a sentence."""
    parts = []
    for file, document in documents("tune-text"):
        rows = [row for row in document["rows"] if row["n"]]
        keep = sorted((row for row in rows if row["keeps"]), key=lambda row: -row["speedup"])
        lost = [f"`{row['recipe']}`" for row in rows if not row["keeps"]]
        body = table(
            ["recipe", *(heading for heading, _ in COLUMNS.values())],
            [[_name(row["recipe"]), *(known(row, key, COLUMNS) for key in COLUMNS)] for row in keep],
        )
        head = (
            f"`{document['model']}`, {document['budget']}, {document['time']} of tuning ({document['trials']} compositions ran whole,"
            f" {document['given_up']} were given up); {hardware_name(document, file)}"
        )
        parts.append(f"{head}\n\n{body}\nDid not keep it: {', '.join(lost) or 'none'}.\n")
    return below_each_other(parts)


def _name(recipe: str) -> str:
    return "**tuned**" if recipe == "tuned" else f"`{recipe}`"
