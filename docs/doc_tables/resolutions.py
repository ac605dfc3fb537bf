"""`benchmarks/resolutions.py`: several resolutions, windows of frames, drafts, and the restorer of digits."""

from __future__ import annotations

from typing import Any

from doc_tables.results import (
    COLUMNS,
    Columns,
    below_each_other,
    decibel,
    documents,
    hardware_and_versions,
    known,
    percent,
    row_name,
    table,
    thousandths,
)

COMPARED = ("speedup", "nfe", "psnr_median", "psnr_converged", "latent_error", "prompt_accuracy")

LONG: Columns = {
    "times": ("length", lambda value: f"{value} x"),
    "frames": ("frames seen", lambda value: f"{value:.0f}"),
    "pairs": ("pairs of frames", lambda value: f"{value:.0f}"),
    "digit": ("digit right", percent),
    "direction": ("direction right", percent),
    "same_digit": ("one digit throughout", percent),
    "whole": ("read as one", percent),
    "jump": ("largest step of a frame", lambda value: f"{value:.1f}"),
}

RESTORED: Columns = {
    "psnr_median": ("PSNR dB, median", decibel),
    "prompt_accuracy": ("digit right", percent),
    "frechet": ("Frechet", decibel),
    "edges": ("edges", thousandths),
}


def bottleneck() -> str:
    """Full, low, full resolution, per model."""
    return _compared("resolutions-bottleneck")


def drafts() -> str:
    """Runs that start from a draft, per model."""
    return _compared("resolutions-drafts")


def windows() -> str:
    """Long clips, read in stretches."""
    return _own("resolutions-windows", LONG, "steps {steps}; {n} clips a row")


def restore() -> str:
    """The restorer, by number of steps."""
    return _own("resolutions-restore", RESTORED, "{n} unseen pictures; trained in {steps} steps, {training_seconds:.0f} s of one core")


def _compared(command: str) -> str:
    parts = []
    for file, document in documents(command):
        rows = document["rows"]
        body = table(
            ["recipe", "", *(COLUMNS[key][0] for key in COMPARED)],
            [[row_name(row), "control" if row["control"] else "", *(known(row, key, COLUMNS) for key in COMPARED)] for row in rows],
            left=2,
        )
        remark = f"; {document['remark']}" if "remark" in document else ""
        how = f"{rows[0]['model']}, {document['steps']} steps, {rows[0]['n']} runs{remark}"
        parts.append(f"{how}; {hardware_and_versions(document, file)}\n\n{body}")
    return below_each_other(parts)


def _own(command: str, columns: Columns, how: str) -> str:
    parts = []
    for file, document in documents(command):
        rows: list[dict[str, Any]] = document["rows"]
        body = table(
            ["", *(heading for heading, _ in columns.values())],
            [[row["recipe"], *(known(row, key, columns) for key in columns)] for row in rows],
        )
        said = how.format(**{"steps": document["steps"], **rows[0]})
        parts.append(f"{said}; {hardware_and_versions(document, file)}\n\n{body}")
    return below_each_other(parts)
