"""`benchmarks/token_images.py`: speculative Jacobi decoding on tiny-tokens."""

from __future__ import annotations

from doc_tables.results import (
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
    "n": ("images", str),
    "tokens_per_forward": ("tokens per forward", lambda value: f"{value:.2f}"),
    "speedup": ("speed-up", times),
    "prompt_accuracy": ("digit right", percent),
    "frechet": ("Frechet", lambda value: f"{value:.1f}"),
    "recall": ("recall", percent),
}

NAMES = {"other_seed": "control: other seeds", "real": "reference"}


def token_images() -> str:
    """All rows with their intervals."""
    parts = []
    for file, document in documents("token-images"):
        body = table(
            ["recipe", "", "noise", "window", *(heading for heading, _ in COLUMNS.values())],
            [
                [
                    row["recipe"] if row.get("control") == "real" else f"`{row['recipe']}`",
                    NAMES.get(row.get("control", ""), ""), row.get("noise", ""), str(row.get("window", "")),
                    *(_cell(row, key) for key in COLUMNS),
                ]
                for row in document["rows"]
            ],
            left=3,
        )  # fmt: skip
        parts.append(f"temperature {document['temperature']}; {hardware_and_versions(document, file)}\n\n{body}")
    return below_each_other(parts)


def _cell(row: Row, key: str) -> str:
    """The value, and its interval where it has one that is not a point."""
    value, ends = known(row, key, COLUMNS), row.get(f"{key}_interval")
    if not value or ends is None or ends[0] == ends[1]:
        return value
    low, high = (COLUMNS[key][1](end).removesuffix(" %").removesuffix("x") for end in ends)
    return f"{value} ({low} to {high})"
