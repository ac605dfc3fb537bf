"""Sparse attention: speed, quality, and end to end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from doc_tables.results import (
    COLUMNS,
    VERDICT,
    Columns,
    Row,
    below_each_other,
    documents,
    hardware_name,
    known,
    percent,
    row_name,
    table,
    tenths_of_percent,
    thousandths,
    times,
)

SPEED_COLUMNS: Columns = {
    "density": ("density", tenths_of_percent),
    "mass": ("mass read", percent),
    "output_error": ("output error", thousandths),
    "speedup": ("speed-up", times),
    "ideal_share": ("of 1 / density", percent),
    "planning_fraction": ("plan, of dense", tenths_of_percent),
    "speedup_with_planning": ("with a new plan", times),
    "predicted": ("predicted", times),
}


def speed() -> str:
    """Every row of `hasten bench attention`, one table per machine and size."""
    parts = []
    for file, document in documents("attention-speed"):
        for size in dict.fromkeys(row["model"] for row in document["rows"]):
            rows = [row for row in document["rows"] if row["model"] == size]
            keys = [key for key in SPEED_COLUMNS if any(row.get(key) is not None for row in rows)]
            ran = [row for row in rows if "note" not in row]
            body = table(
                ["method", *(SPEED_COLUMNS[key][0] for key in keys)],
                [[_method(row), *(known(row, key, SPEED_COLUMNS) for key in keys)] for row in ran],
            )
            reasons = "".join(f"- {row['recipe']}: {row['note']}\n" for row in rows if "note" in row)
            parts.append(f"**{size}**, {hardware_name(document, file)}\n\n{body}" + (f"\n{reasons}" if reasons else ""))
    return below_each_other(parts)


def _method(row: Row) -> str:
    return f"`{row['recipe']}`" if not row.get("control") and row.get("density") != 1 else str(row["recipe"])


def bars() -> str:
    """What the issue asks of sparse attention, by the committed results."""
    rows = []
    for file, document in documents("attention-quality"):
        rows += [[bar["bar"], file.parent.name, VERDICT[bar["met"]], bar["detail"]] for bar in document["bars"]]
    for file, document in documents("attention-speed"):
        near = [
            row
            for row in document["rows"]
            if row.get("tokens") == 8192 and row.get("head_dim") == 64 and row.get("asked") == 0.2
            and row.get("speedup") and not row.get("control")
        ]  # fmt: skip
        if near:
            best = max(near, key=lambda row: float(row["speedup"]))
            detail = f"{best['recipe']} at {100 * best['density']:.1f} %: {best['speedup']:.2f}x"
            bar = "8192 tokens, head dim 64, 20 %: 3x faster than SDPA"
            rows.append([bar, file.parent.name, VERDICT[best["speedup"] >= 3], detail])
    headings = ["bar", "measured on", "met", "numbers"]
    return table(headings, rows, left=4)


QUALITY_COLUMNS: Columns = {
    "density": ("density", tenths_of_percent),
    "tile_density": ("in tiles", tenths_of_percent),
    "mass": ("mass", thousandths),
    "oracle_mass": ("oracle's", thousandths),
    "dropped_error": ("error, rest dropped", thousandths),
    "output_error": ("error", thousandths),
    "rho_error": ("rho off by", thousandths),
    "planning_seconds": ("plan, ms", lambda value: f"{1000 * value:.0f}"),
}


SHARPNESS_COLUMNS: Columns = {
    "sharpness": ("largest logit", lambda value: f"{value:.0f}"),
    "mass": ("mass read", thousandths),
    "dropped_error": ("error, rest dropped", thousandths),
    "output_error": ("error", lambda value: f"{value:.4f}"),
    "ratio": ("ratio", thousandths),
    "rho_error": ("rho off by", lambda value: f"{value:.4f}"),
}


def quality() -> str:
    """Means over heads and seeds (or steps and layers) of every method and recipe of the quality study."""
    parts = []
    for file, document in documents("attention-quality"):
        groups: dict[tuple[str, str], dict[tuple[str, float], list[Row]]] = {}
        for row in document["rows"]:
            if "note" not in row:
                group = groups.setdefault((row["model"].partition(",")[0], row["budget"]), {})
                group.setdefault((row["recipe"], row.get("asked") or 0.0), []).append(row)
        words = {"tokens": "equal density of tokens", "tiles": "equal work of tiles", "own": "at its own settings"}
        for (model, budget), group in sorted(groups.items(), key=lambda item: (item[0][0] != "synthetic", item[0][0])):
            means = [(name, _means(rows)) for (name, _), rows in sorted(group.items(), key=lambda item: item[0][1])]
            keys = [key for key in QUALITY_COLUMNS if any(key in mean for _, mean in means)]
            cells = [[name, *(known(mean, key, QUALITY_COLUMNS) for key in keys)] for name, mean in means]
            body = table(["method", *(QUALITY_COLUMNS[key][0] for key in keys)], cells)
            parts.append(f"**{model}**, {words[budget]} ({file.parent.name})\n\n{body}")
    return below_each_other(parts)


def _means(rows: Sequence[Row]) -> Row:
    """Mean of each column over the rows that have it."""
    known_of = {key: [float(row[key]) for row in rows if row.get(key) is not None] for key in QUALITY_COLUMNS}
    return {key: statistics.mean(values) for key, values in known_of.items() if values}


def sharpness() -> str:
    """How the gain from compensation depends on how sharp the synthetic heads are."""
    found = [row for _, document in documents("attention-quality") for row in document.get("sharpness", [])]
    rows = [[known(row, key, SHARPNESS_COLUMNS) for key in SHARPNESS_COLUMNS] for row in found]
    return table([heading for heading, _ in SHARPNESS_COLUMNS.values()], rows, left=0)


END_TO_END = ("n", "speedup", "density", "rho", "psnr_median", "psnr_worst", "prompt_accuracy")


def end_to_end() -> str:
    """Every recipe of sparse attention on the bundled models, alone and with a cache."""
    columns = {**COLUMNS, "density": ("density", percent), "rho": ("mass read", percent)}
    parts = []
    for file, document in documents("attention-end-to-end"):
        rows = [row for row in document["rows"] if row.get("n")]
        cells = [[row_name(row), *(_read(row, key, columns) for key in END_TO_END)] for row in rows]
        body = table(["run", *(columns[key][0] for key in END_TO_END)], cells)
        parts.append(f"**{rows[0]['model']}**, {hardware_name(document, file)}\n\n{body}")
    return below_each_other(parts)


def _read(row: Row, key: str, columns: Columns) -> str:
    same = row.get("exact_match") or row["recipe"] == "plain"
    return "identical" if row.get(key) is None and key.startswith("psnr") and same else known(row, key, columns)
