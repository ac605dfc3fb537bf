"""Runs of whole pipelines: every recipe, the bundled models themselves, and the networks of diffusers."""

from __future__ import annotations

from doc_tables.results import (
    COLUMNS,
    Columns,
    Row,
    below_each_other,
    cell,
    document,
    documents,
    hardware_and_versions,
    kind,
    known,
    percent,
    row_name,
    table,
    tenths_of_percent,
    thousandths,
)


def results() -> str:
    """All rows of every `recipes.json`, one table per hardware and model."""
    parts = []
    for file, found in documents("recipes"):
        rows: list[Row] = found["rows"]
        for model in dict.fromkeys(row.get("model", "") for row in rows):
            chosen = [row for row in rows if row.get("model", "") == model]
            keys = [key for key in COLUMNS if any(row.get(key) is not None for row in chosen)]
            title = f"`{model}` on {hardware_and_versions(found, file)}"
            body = table(
                ["run", "what", *(COLUMNS[key][0] for key in keys)],
                [[row_name(row), kind(row), *(cell(row, key) for key in keys)] for row in chosen],
                left=2,
            )
            parts.append(f"**{title}**\n\n{body}")
    return below_each_other(parts)


MODEL_COLUMNS: Columns = {
    "n": ("samples", str),
    "seconds": ("seconds", lambda value: f"{value:.1f}"),
    "digit_accuracy": ("right digit", percent),
    "direction_accuracy": ("right direction", percent),
    "speed_accuracy": ("right speed", percent),
    "frechet": ("Frechet", lambda value: f"{value:.0f}"),
    "frechet_of_as_many_real": ("of real clips", lambda value: f"{value:.0f}"),
    "recall": ("recall", percent),
    "recall_of_as_many_real": ("of real clips", percent),
}


TEXT_COLUMNS: Columns = {
    "parameters": ("million parameters", lambda value: f"{value / 1e6:.1f}"),
    "n": ("questions per task", str),
    "exact_match": ("exact match", tenths_of_percent),
    "exact_match_deterministic_worst": ("worst task with one answer", tenths_of_percent),
    "exact_match_shuffle": ("`shuffle`", tenths_of_percent),
    "exact_match_insert": ("`insert` anywhere", tenths_of_percent),
    "nll_deterministic": ("nats, one answer", thousandths),
    "nll_above_shuffle": ("`shuffle`: nats above ln n!", thousandths),
    "nll_above_insert": ("`insert`: above ln(n+1)", thousandths),
    "code_nats": ("nats per token of unseen code", thousandths),
}


def models() -> str:
    """What the judge reads in plain runs of the bundled models, from every `tiny_models.json`."""
    rows = []
    for file, found in documents("tiny_models"):
        for row in found["rows"]:
            cells = [known(row, key, MODEL_COLUMNS) for key in MODEL_COLUMNS]
            rows.append([f"`{row['model']}`", file.parent.name, *cells])
    headings = ["model", "measured on", *(heading for heading, _ in MODEL_COLUMNS.values())]
    return table(headings, rows, left=2)


def text_models() -> str:
    """Exact match of the bundled text models, from every `tiny_text.json`."""
    rows = []
    for file, found in documents("tiny_text"):
        for row in found["rows"]:
            cells = [known(row, key, TEXT_COLUMNS) for key in TEXT_COLUMNS]
            rows.append([f"`{row['model']}`", file.parent.name, *cells])
    headings = ["model", "measured on", *(heading for heading, _ in TEXT_COLUMNS.values())]
    return table(headings, rows, left=2)


def conformance() -> str:
    """One row per transformer class of diffusers, then the classes that are not built."""
    found = document("conformance.json")
    if found is None:
        return below_each_other([])
    rows = []
    for row in found["rows"]:
        lists = ", ".join(f"`{name}` ({num})" for name, num in row["lists"].items())
        losses = [f"{row['network_loss']:.0e}", f"{row['blocks_loss']:.0e}"]
        rows.append([f"`{row['model']}`", lists or "refused", row["why"], *losses])
    headings = ["class", "blocks that can be left out", "why not (all)", "whole network: lost", "blocks: lost"]
    body = table(headings, rows, left=3)
    left_out = "".join(f"- `{name}`: {reason}.\n" for name, reason in found["excluded"].items())
    return f"{body}\nNot built, diffusers {found['versions']['diffusers']}:\n\n{left_out}"
