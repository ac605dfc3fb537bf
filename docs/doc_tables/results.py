"""What all tables are made of: result files, columns, cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOT_YET = "not measured yet"

Row = dict[str, Any]
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Row key -> heading and format, in the order of the columns."""

VERDICT = {True: "**yes**", False: "**no**", None: NOT_YET}
"""What a bar's `met` reads like."""


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def tenths_of_percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def times(value: float) -> str:
    return f"{value:.2f}x"


def decibel(value: float) -> str:
    return f"{value:.1f}"


def thousandths(value: float) -> str:
    return f"{value:.3f}"


COLUMNS: Columns = {
    "n": ("runs", str),
    "speedup": ("speed-up", times),
    "nfe": ("evaluations", lambda value: f"{value:.0f}"),
    "computed_fraction": ("computed", percent),
    "psnr_median": ("PSNR dB, median", decibel),
    "psnr_worst": ("worst", decibel),
    "ssim_median": ("SSIM", lambda value: f"{value:.4f}"),
    "latent_error": ("latent error", thousandths),
    "psnr_converged": ("to converged, dB", decibel),
    "prompt_accuracy": ("prompt accuracy", percent),
    "frechet": ("Frechet", lambda value: f"{value:.1f}"),
    "recall": ("recall", percent),
    "bytes_held": ("cache MiB", lambda value: f"{value / 2**20:.2f}"),
}
"""The columns of runs of a pipeline."""

KINDS = {"": "ours", "fewer_steps": "control", "other_seed": "control", "oracle": "oracle", "peer": "peer"}
"""Start of a row's `control` -> what the row is."""


def below_each_other(tables: Sequence[str]) -> str:
    """Tables with their titles as one text, or that there are none yet."""
    return "\n".join(tables) if tables else f"{NOT_YET.capitalize()}.\n"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table, or that there is none yet; the first `left` columns are aligned left, the others right."""
    rows = list(rows)
    if not rows:
        return below_each_other([])
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * left + "---:|" * (len(headings) - left)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def documents(command: str) -> list[tuple[Path, dict[str, Any]]]:
    """Every result file of one benchmark (recipes.json, recipes-image.json, ...), per hardware folder."""
    return [(file, json.loads(file.read_text())) for file in sorted(RESULTS.glob(f"*/{command}*.json"))]


def document(name: str) -> dict[str, Any] | None:
    """One file below `RESULTS`; None where it is not there."""
    file = RESULTS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def hardware_name(document: dict[str, Any], file: Path) -> str:
    """What the times were taken on, in words."""
    facts = document.get("hardware", {})
    device = facts.get("gpu") or facts.get("device") or facts.get("cpu")
    threads = facts.get("threads")
    words = [str(device)] if device else []
    words += [f"{threads} threads"] if threads else []
    return f"{file.parent.name}: {', '.join(words)}" if words else file.parent.name


def hardware_and_versions(document: dict[str, Any], file: Path) -> str:
    """The same, and which torch and diffusers ran."""
    versions = ", ".join(f"{k} {v}" for k, v in document.get("versions", {}).items() if k in ("torch", "diffusers"))
    return hardware_name(document, file) + (f" ({versions})" if versions else "")


def row_name(row: Row) -> str:
    """The recipe, or what stands in its place."""
    return f"`{row['recipe']}`" if not row.get("control") else str(row.get("recipe") or row["control"])


def kind(row: Row) -> str:
    """Whether a row is ours, a control, the oracle or a peer."""
    start = (row.get("control") or "").partition(":")[0]
    return KINDS.get(start, start)


def cell(row: Row, key: str) -> str:
    """One value; JSON has no infinity, so the plain run's PSNR to itself is null."""
    same = row.get(key) is None and row.get("recipe") == "plain" and key in ("psnr_median", "psnr_worst")
    return "identical" if same else known(row, key, COLUMNS)


def known(row: Row, key: str, columns: Columns) -> str:
    """One value in its column's format; nothing where it was not measured."""
    return columns[key][1](row[key]) if row.get(key) is not None else ""
