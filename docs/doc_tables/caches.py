"""`hasten bench cache`: every row, the bars, and how well each named tolerance was met."""

from __future__ import annotations

import math
import statistics

from doc_tables.results import (
    COLUMNS,
    VERDICT,
    Row,
    below_each_other,
    cell,
    decibel,
    documents,
    hardware_and_versions,
    kind,
    percent,
    row_name,
    table,
)

CACHE_COLUMNS = (
    "n", "speedup", "computed_fraction", "psnr_median", "psnr_worst", "ssim_median", "latent_error", "prompt_accuracy",
    "bytes_held",
)  # fmt: skip


def bars() -> str:
    """One row per bar of `hasten bench cache`, one column per model: yes or no, and the numbers."""
    found = [document for _, document in documents("cache")]
    if not found:
        return below_each_other([])
    models = [str(document["rows"][0]["model"]) for document in found]
    questions = [bar["bar"] for bar in found[0]["bars"]]
    rows = []
    for number, question in enumerate(questions):
        answers = [document["bars"][number] for document in found]
        rows.append([question, *(f"{VERDICT[answer['met']]}: {answer['detail']}" for answer in answers)])
    return table(["bar, for `auto`", *(f"`{model}`" for model in models)], rows, left=len(models) + 1)


def cache() -> str:
    """All rows of every `cache-*.json`: what was measured by falling speed-up, then what could not run."""
    parts = []
    for file, document in documents("cache"):
        rows: list[Row] = document["rows"]
        measured = sorted((row for row in rows if row.get("n")), key=lambda row: -(row.get("speedup") or 0))
        body = table(
            ["run", "what", *(COLUMNS[key][0] for key in CACHE_COLUMNS)],
            [[row_name(row), kind(row), *(cell(row, key) for key in CACHE_COLUMNS)] for row in measured],
            left=2,
        )
        reasons = "".join(f"- {row['recipe']}: {row['note']}\n" for row in rows if row.get("note"))
        title = f"### `{rows[0]['model']}`\n{hardware_and_versions(document, file)}"
        parts.append(f"{title}\n\n{body}" + (f"\nNotes of the run:\n\n{reasons}" if reasons else ""))
    return below_each_other(parts)


def budget() -> str:
    """How well each named tolerance was met in `hasten bench cache`, by the single runs."""
    rows = []
    for _, document in documents("cache"):
        video = document["rows"][0]["model"] == "tiny-video"
        definite = [video or " at the " in prompt for prompt, _ in document["samples"]]
        for row in document["rows"]:
            metric, equals, value = row["recipe"].rpartition(" @ ")[2].partition("=")
            runs = document["outcomes"].get(row["recipe"])
            if row.get("control") or not equals or not runs or metric not in ("psnr", "latent_error"):
                continue
            values = [math.inf if run[metric] is None else run[metric] for run in runs]
            met = [v >= float(value) if metric == "psnr" else v <= float(value) for v in values]
            sure = [kept for kept, named in zip(met, definite, strict=True) if named]
            form = decibel if metric == "psnr" else lambda v: f"{v:.4f}"
            worst = min(values) if metric == "psnr" else max(values)
            reached = [percent(row["computed_fraction"]), form(statistics.median(values)), form(worst)]
            within = [f"{sum(kept)} of {len(kept)}" for kept in (met, sure)]
            rows.append([f"`{row['model']}`", f"{metric}={value}", *reached, *within])
    headings = ["model", "tolerance", "computed", "reached, median", "worst", "runs within", "of prompts that name all"]
    return table(headings, rows, left=2)
