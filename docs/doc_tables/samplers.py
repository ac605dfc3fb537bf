"""`benchmarks/samplers_*.py`: orders of solvers, searched sequences, time travel, searched noises."""

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
    table,
    thousandths,
)

SEQUENCES: Columns = {
    "steps": ("calls", str),
    "computed_fraction": ("of the work", percent),
    "latent_error_tuning": ("latent error, searched prompts", thousandths),
    "latent_error": ("other prompts", thousandths),
}
QUALITY: Columns = {
    "nfe": ("evaluations", lambda value: f"{value:.0f}"),
    "n": ("pictures or clips", str),
    "prompt_accuracy": ("digit right", percent),
    "log_probability": ("log probability", thousandths),
    "frechet": ("Frechet", lambda value: f"{value:.1f}"),
    "recall": ("recall", percent),
}


def orders() -> str:
    """Errors by steps, and how they fall."""
    parts = []
    for file, document in documents("samplers-orders"):
        steps = list(document["rows"][0]["errors"])
        rows = [
            [_solver(row), row["model"], *(f"{row['errors'][n]:.1e}" for n in steps), f"{row['slope']:.1f}"]
            for row in document["rows"]
        ]
        body = table(["solver", "path", *(f"{n} steps" for n in steps), "order seen"], rows, left=2)
        parts.append(f"{hardware_and_versions(document, file)}\n\n{body}")
    return below_each_other(parts)


def _solver(row: dict[str, Any]) -> str:
    return f"`{row['recipe']}`" + (f", order {row['order']}" if row["order"] else "")


def sequences() -> str:
    """Searched levels and blocks, by model."""
    parts = []
    for file, document in documents("samplers-sequences"):
        where = hardware_and_versions(document, file)
        how = f"{document['n_tuning']} prompts searched on with {document['trials']} trials, {document['n']} others; {where}"
        parts.append(f"`{document['rows'][0]['model']}`; {how}\n\n{_rows(document, SEQUENCES)}")
    return below_each_other(parts)


def solvers() -> str:
    """All solvers on bundled models: a row each, a column of PSNR for each number of evaluations."""
    parts = []
    for file, document in documents("samplers-solvers"):
        plain, *rows = document["rows"]
        asked = sorted({row["asked"] for row in rows if row["n"]})
        cells: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            cells.setdefault(row["recipe"], {}).update({row["asked"]: row} if row["n"] else {})
        keys = ("psnr_median", "psnr_converged", "prompt_accuracy")
        heads = [f"{name}, {n}" for n in asked for name in ("PSNR dB", "to converged", "right")]
        lines = [
            [f"`{name}`", *((known(by[n], key, COLUMNS) if n in by else "none") for n in asked for key in keys)]
            for name, by in cells.items()
        ]
        how = (
            f"`{plain['model']}`, {plain['n']} runs; plain run of {document['steps']} steps ({decibel(plain['psnr_converged'])} dB to"
            f" converged, {percent(plain['prompt_accuracy'])} right); {hardware_and_versions(document, file)}"
        )
        parts.append(f"{how}\n\n{table(['solver', *heads], lines, left=1)}")
    return below_each_other(parts)


def noises() -> str:
    """Searches over noises."""
    return _quality("samplers-noises")


def travel() -> str:
    """Time travel."""
    return _quality("samplers-travel")


def _quality(command: str) -> str:
    return below_each_other(
        [f"{d['rows'][0]['model']}; {hardware_and_versions(d, file)}\n\n{_rows(d, QUALITY)}" for file, d in documents(command)]
    )


def _rows(document: dict[str, Any], columns: Columns) -> str:
    rows = [
        [row["recipe"], "control" if row.get("control") else "", *(known(row, key, columns) for key in columns)]
        for row in document["rows"]
    ]
    return table(["", "", *(heading for heading, _ in columns.values())], rows, left=2)
