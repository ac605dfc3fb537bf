"""`hasten bench compose`: tuned compositions against every single method."""

from __future__ import annotations

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

COLUMNS: Columns = {
    "speedup": ("speed-up", lambda value: f"{value:.2f}x"),
    "nfe": ("evaluations", lambda value: f"{value:g}"),
    "psnr_median": ("PSNR dB, median", lambda value: f"{value:.1f}"),
    "psnr_worst": ("worst", lambda value: f"{value:.1f}"),
    "psnr_converged": ("to the converged run", lambda value: f"{value:.1f}"),
    "kept": ("30 dB kept", lambda value: f"{value:.0%}"),
}

BEST = 3
"""Rows of each kind that are shown at each PSNR."""

PSNRS = (30.0, 35.0, 40.0)


def bars() -> str:
    """One row per bar and model."""
    rows = [
        [f"`{document['rows'][0]['model']}`", bar["bar"], f"{VERDICT[bar['met']]}: {bar['detail']}"]
        for _, document in documents("compose")
        for bar in document["bars"]
    ]
    return table(["model", "bar", "met"], rows, left=3)


def compose() -> str:
    """For each model and PSNR: the tuned composition, and the fastest of each kind of rival that keep it."""
    parts = []
    for file, document in documents("compose"):
        rows: list[Row] = document["rows"]
        shown: list[list[object]] = []
        for psnr in PSNRS:
            for row in _fastest(rows, psnr):
                label = f"`{row['recipe']}`" if row["what"] in ("tuned", "preset") else str(row["recipe"])
                shown.append([f"{psnr:g} dB", row["what"], label, *(known(row, key, COLUMNS) for key in COLUMNS)])
        body = table(["keeps", "what", "run", *(heading for heading, _ in COLUMNS.values())], shown, left=3)
        facts = (
            f"{document['held']} held-out prompts, {document['trials']} trials in {document['tuning_seconds']:.0f} s of tuning;"
            f" {hardware_and_versions(document, file)}. Another seed: {document['noise_floor']:.1f} dB; the plain run to the"
            f" converged one: {document['plain_to_converged']:.1f} dB."
        )
        parts.append(f"### `{rows[0]['model']}`\n{facts}\n\n{body}")
    return below_each_other(parts)


def _fastest(rows: list[Row], psnr: float) -> list[Row]:
    """The composition that was tuned for this PSNR, then the fastest of each other kind."""
    found = [row for row in rows if psnr in row["tuned_for"]]
    for what in ("preset", "peer", "fewer steps"):
        kept = [row for row in rows if row["what"] == what and psnr in row["keeps"]]
        found += sorted(kept, key=lambda row: ("timed" not in row, -row["speedup"]))[:BEST]  # the photo finish first
    return found
