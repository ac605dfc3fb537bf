"""`benchmarks/decode_kv.py`: cache policies of causal models, and shared prefixes."""

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
    tenths_of_percent,
)

QUALITY: Columns = {
    "kl": ("KL", lambda value: f"{value:.4f}"),
    "kl_worst_text": ("worst text", lambda value: f"{value:.4f}"),
    "agreement": ("same first choice", tenths_of_percent),
    "bits_per_token": ("bits per token", lambda value: f"{value:.2f}"),
    "letters": ("letters found", percent),
    "needles": ("needles found", percent),
    "bytes_share": ("bytes held", percent),
    "far_share": ("in a slower memory", lambda value: percent(value) if value else ""),
}

SHARED: Columns = {
    "batch": ("rows", str),
    "prefix": ("prefix", lambda value: f"{value:,}"),
    "heads": ("heads", str),
    "key_heads": ("key heads", str),
    "dim": ("dimension", str),
    "speedup": ("times as fast", lambda value: f"{value:.1f}"),
    "largest_difference": ("largest difference", lambda value: f"{value:.0e}"),
    "bytes_separate": ("MiB, each its own", lambda value: f"{value / 2**20:.0f}"),
    "bytes_shared": ("MiB, shared", lambda value: f"{value / 2**20:.0f}"),
}


def quality() -> str:
    """One table for each share of the text, the whole cache first."""
    parts = []
    for file, document in documents("kv-quality"):
        rows = sorted(document["rows"], key=lambda row: (row["policy"] != "full", row["budget"] or 2.0))
        body = table(
            ["policy", "budget", *(heading for heading, _ in QUALITY.values())],
            [[f"`{row['policy']}`", _budget(row), *(known(row, key, QUALITY) for key in QUALITY)] for row in rows],
            left=2,
        )
        where = f"{document['model']}, {document['rows'][0]['n']} texts; {hardware_and_versions(document, file)}"
        parts.append(f"{where}\n\n{body}")
    return below_each_other(parts)


def _budget(row: Row) -> str:
    return "all tokens" if row["budget"] is None else percent(row["budget"])


def shared() -> str:
    """Attention of one new token in each row."""
    parts = []
    for file, document in documents("kv-shared"):
        rows = [row for row in document["rows"] if row["of"] == "attention"]
        body = table(
            [heading for heading, _ in SHARED.values()], [[known(row, key, SHARED) for key in SHARED] for row in rows], left=0
        )
        parts.append(f"{hardware_and_versions(document, file)}\n\n{body}")
    return below_each_other(parts)
