"""Writes the tables of the README and the docs from the recipe registry and the measured results.

    python docs/make_tables.py            rewrite them
    python docs/make_tables.py --check    exit 1 when one differs from what it should be

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. Names: recipes, results, models, conformance, bars, cache, budget,
attention-speed, attention-bars, attention-quality, attention-sharpness, kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
ARXIV = re.compile(r"(?:arXiv )?(\d{4}\.\d{5})")
NOT_YET = "not measured yet"

Row = dict[str, Any]


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _decibel(value: float) -> str:
    return f"{value:.1f}"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "n": ("runs", str),
    "speedup": ("speed-up", lambda value: f"{value:.2f}x"),
    "nfe": ("evaluations", lambda value: f"{value:.0f}"),
    "computed_fraction": ("computed", _percent),
    "psnr_median": ("PSNR dB, median", _decibel),
    "psnr_worst": ("worst", _decibel),
    "ssim_median": ("SSIM", lambda value: f"{value:.4f}"),
    "latent_error": ("latent error", lambda value: f"{value:.3f}"),
    "psnr_converged": ("to converged, dB", _decibel),
    "prompt_accuracy": ("prompt accuracy", _percent),
    "frechet": ("Frechet", lambda value: f"{value:.1f}"),
    "recall": ("recall", _percent),
    "bytes_held": ("cache MiB", lambda value: f"{value / 2**20:.2f}"),
}
"""Row key -> heading and format, in the order of the columns."""

KINDS = {"": "ours", "fewer_steps": "control", "other_seed": "control", "oracle": "oracle", "peer": "peer"}
"""Start of a row's `control` -> what the row is."""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; the first `left` columns are aligned left, the others right."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * left + "---:|" * (len(headings) - left)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# --- results --------------------------------------------------------------------------------------


def documents(command: str) -> list[tuple[Path, dict[str, Any]]]:
    """Every result file of one benchmark (recipes.json, recipes-image.json, ...), per hardware folder."""
    return [(file, json.loads(file.read_text())) for file in sorted(RESULTS.glob(f"*/{command}*.json"))]


def hardware_name(document: dict[str, Any], file: Path) -> str:
    """What the times were taken on, in words."""
    facts = document.get("hardware", {})
    device = facts.get("gpu") or facts.get("device") or facts.get("cpu")
    threads = facts.get("threads")
    words = [str(device)] if device else []
    words += [f"{threads} threads"] if threads else []
    return f"{file.parent.name}: {', '.join(words)}" if words else file.parent.name


def row_name(row: Row) -> str:
    """The recipe, or what stands in its place."""
    return f"`{row['recipe']}`" if not row.get("control") else str(row.get("recipe") or row["control"])


def kind(row: Row) -> str:
    """Whether a row is ours, a control, the oracle or a peer."""
    start = (row.get("control") or "").partition(":")[0]
    return KINDS.get(start, start)


def cell(row: Row, key: str) -> str:
    """One value; JSON has no infinity, so the plain run's PSNR to itself is null."""
    value = row.get(key)
    if value is None:
        return "identical" if row.get("recipe") == "plain" and key in ("psnr_median", "psnr_worst") else ""
    return COLUMNS[key][1](value)


def results_table() -> str:
    """All rows of every `recipes.json`, one table per hardware and model."""
    parts = []
    for file, document in documents("recipes"):
        rows: list[Row] = document["rows"]
        versions = ", ".join(f"{k} {v}" for k, v in document.get("versions", {}).items() if k in ("torch", "diffusers"))
        for model in dict.fromkeys(row.get("model", "") for row in rows):
            chosen = [row for row in rows if row.get("model", "") == model]
            keys = [key for key in COLUMNS if any(row.get(key) is not None for row in chosen)]
            title = f"`{model}` on {hardware_name(document, file)}" + (f" ({versions})" if versions else "")
            body = table(
                ["run", "what", *(COLUMNS[key][0] for key in keys)],
                [[row_name(row), kind(row), *(cell(row, key) for key in keys)] for row in chosen],
                left=2,
            )
            parts.append(f"**{title}**\n\n{body}")
    return "\n".join(parts) if parts else f"{NOT_YET.capitalize()}.\n"


# --- recipes --------------------------------------------------------------------------------------


def part_text(part: Any) -> str:
    """`network(rule spread(share 0.24), forecast polynomial, correct)`: nested parts, and what is not the default."""
    inner = []
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if name == "signal" and not part.rule.needs_signal:
            continue  # a schedule asks no signal
        if hasattr(value, "kind"):
            inner.append(f"{name} {part_text(value)}")
        elif value != field.get_default(call_default_factory=True):
            inner.append(name if value is True else f"{name} {_value(value)}")
    return part.kind + (f"({', '.join(inner)})" if inner else "")


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + " ".join(part_text(item) if hasattr(item, "kind") else str(item) for item in value) + "]"
    return str(value)


def measured_where() -> dict[str, list[str]]:
    """Recipe name -> hardware folders whose results have a row of it."""
    found: dict[str, list[str]] = {}
    for file, document in [*documents("recipes"), *documents("cache")]:
        for row in document["rows"]:
            if row.get("control") or not row.get("n"):
                continue
            places = found.setdefault(row["recipe"].partition(" @ ")[0], [])
            if file.parent.name not in places:
                places.append(file.parent.name)
    return found


def recipes_table() -> str:
    """One row per recipe of the registry."""
    from hasten.pipelines.recipes import catalogue

    where = measured_where()
    rows = []
    for entry in catalogue():
        parts = "; ".join(f"{axis}: {part_text(part)}" for axis, part in entry.recipe.axes.items())
        paper = ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\g<1>)", entry.paper) or "ours"
        rows.append([f"`{entry.name}`", paper, parts or "none", ", ".join(where.get(entry.name, [NOT_YET]))])
    return table(["recipe", "paper", "parts", "measured on"], rows, left=4)


# --- models ---------------------------------------------------------------------------------------

MODEL_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "n": ("samples", str),
    "seconds": ("seconds", lambda value: f"{value:.1f}"),
    "digit_accuracy": ("right digit", _percent),
    "direction_accuracy": ("right direction", _percent),
    "speed_accuracy": ("right speed", _percent),
    "frechet": ("Frechet", lambda value: f"{value:.0f}"),
    "frechet_of_as_many_real": ("of real clips", lambda value: f"{value:.0f}"),
    "recall": ("recall", _percent),
    "recall_of_as_many_real": ("of real clips", _percent),
}


def models_table() -> str:
    """What the judge reads in plain runs of the bundled models, from every `tiny_models.json`."""
    rows = []
    for file, document in documents("tiny_models"):
        for row in document["rows"]:
            cells = [form(row[key]) if row.get(key) is not None else "" for key, (_, form) in MODEL_COLUMNS.items()]
            rows.append([f"`{row['model']}`", file.parent.name, *cells])
    headings = ["model", "measured on", *(heading for heading, _ in MODEL_COLUMNS.values())]
    return table(headings, rows, left=2) if rows else f"{NOT_YET.capitalize()}.\n"


def conformance_table() -> str:
    """One row per transformer class of diffusers, then the classes that are not built."""
    document = json.loads((RESULTS / "conformance.json").read_text(encoding="utf-8"))
    rows = []
    for row in document["rows"]:
        lists = ", ".join(f"`{name}` ({num})" for name, num in row["lists"].items())
        losses = [f"{row['network_loss']:.0e}", f"{row['blocks_loss']:.0e}"]
        rows.append([f"`{row['model']}`", lists or "refused", row["why"], *losses])
    headings = ["class", "blocks that can be left out", "why not (all)", "whole network: lost", "blocks: lost"]
    body = table(headings, rows, left=3)
    left_out = "".join(f"- `{name}`: {reason}.\n" for name, reason in document["excluded"].items())
    return f"{body}\nNot built, diffusers {document['versions']['diffusers']}:\n\n{left_out}"


# --- caches against peers -------------------------------------------------------------------------

CACHE_COLUMNS = ("n", "speedup", "computed_fraction", "psnr_median", "psnr_worst", "ssim_median", "latent_error", "prompt_accuracy")


def bars_table() -> str:
    """One row per bar of `hasten bench cache`, one column per model: yes or no, and the numbers."""
    found = [document for _, document in documents("cache")]
    if not found:
        return f"{NOT_YET.capitalize()}.\n"
    models = [str(document["rows"][0]["model"]) for document in found]
    questions = [bar["bar"] for bar in found[0]["bars"]]
    rows = []
    for number, question in enumerate(questions):
        answers = [document["bars"][number] for document in found]
        verdict = {True: "**yes**", False: "**no**", None: NOT_YET}
        rows.append([question, *(f"{verdict[answer['met']]}: {answer['detail']}" for answer in answers)])
    return table(["bar, for `auto`", *(f"`{model}`" for model in models)], rows, left=len(models) + 1)


def cache_table() -> str:
    """All rows of every `cache-*.json`: what was measured by falling speed-up, then what could not run."""
    parts = []
    for file, document in documents("cache"):
        rows: list[Row] = document["rows"]
        keys = [*CACHE_COLUMNS, "bytes_held"]
        measured = sorted((row for row in rows if row.get("n")), key=lambda row: -(row.get("speedup") or 0))
        body = table(
            ["run", "what", *(COLUMNS[key][0] for key in keys)],
            [[row_name(row), kind(row), *(cell(row, key) for key in keys)] for row in measured],
            left=2,
        )
        reasons = "".join(f"- {row['recipe']}: {row['note']}\n" for row in rows if row.get("note"))
        versions = ", ".join(f"{k} {v}" for k, v in document.get("versions", {}).items() if k in ("torch", "diffusers"))
        title = f"### `{rows[0]['model']}`\n{hardware_name(document, file)}" + (f" ({versions})" if versions else "")
        parts.append(f"{title}\n\n{body}" + (f"\nNotes of the run:\n\n{reasons}" if reasons else ""))
    return "\n".join(parts) if parts else f"{NOT_YET.capitalize()}.\n"


def budget_table() -> str:
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
            form = _decibel if metric == "psnr" else lambda v: f"{v:.4f}"
            worst = min(values) if metric == "psnr" else max(values)
            cells = [form(statistics.median(values)), form(worst), f"{sum(met)} of {len(met)}", f"{sum(sure)} of {len(sure)}"]
            rows.append([f"`{row['model']}`", f"{metric}={value}", _percent(row["computed_fraction"]), *cells])
    headings = ["model", "tolerance", "computed", "reached, median", "worst", "runs within", "of prompts that name all"]
    return table(headings, rows, left=2) if rows else f"{NOT_YET.capitalize()}.\n"


# --- sparse attention -----------------------------------------------------------------------------

SPEED_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "density": ("density", lambda value: f"{100 * value:.1f} %"),
    "mass": ("mass read", _percent),
    "output_error": ("output error", lambda value: f"{value:.3f}"),
    "speedup": ("speed-up", lambda value: f"{value:.2f}x"),
    "ideal_share": ("of 1 / density", _percent),
    "planning_fraction": ("plan, of dense", lambda value: f"{100 * value:.1f} %"),
    "speedup_with_planning": ("with a new plan", lambda value: f"{value:.2f}x"),
    "predicted": ("predicted", lambda value: f"{value:.2f}x"),
}


def attention_speed_table() -> str:
    """Every row of `hasten bench attention`, one table per machine and size."""
    parts = []
    for file, document in documents("attention-speed"):
        for size in dict.fromkeys(row["model"] for row in document["rows"]):
            rows = [row for row in document["rows"] if row["model"] == size]
            keys = [key for key in SPEED_COLUMNS if any(row.get(key) is not None for row in rows)]
            body = table(
                ["method", *(SPEED_COLUMNS[key][0] for key in keys)],
                [[_method(row), *(_known(row, key, SPEED_COLUMNS) for key in keys)] for row in rows if "note" not in row],
            )
            reasons = "".join(f"- {row['recipe']}: {row['note']}\n" for row in rows if "note" in row)
            parts.append(f"**{size}**, {hardware_name(document, file)}\n\n{body}" + (f"\n{reasons}" if reasons else ""))
    return "\n".join(parts) if parts else f"{NOT_YET.capitalize()}.\n"


def _method(row: Row) -> str:
    return f"`{row['recipe']}`" if not row.get("control") and row.get("density") != 1 else str(row["recipe"])


def _known(row: Row, key: str, columns: dict[str, tuple[str, Callable[[Any], str]]]) -> str:
    return columns[key][1](row[key]) if row.get(key) is not None else ""


def attention_bars_table() -> str:
    """What the issue asks of sparse attention, by the committed results."""
    rows = []
    for file, document in documents("attention-quality"):
        rows += [[bar["bar"], file.parent.name, "**yes**" if bar["met"] else "**no**", bar["detail"]] for bar in document["bars"]]
    for file, document in documents("attention-speed"):
        near = [
            row
            for row in document["rows"]
            if row.get("tokens") == 8192 and row.get("head_dim") == 64 and row.get("asked") == 0.2 and row.get("speedup")
            and not row.get("control")
        ]  # fmt: skip
        if near:
            best = max(near, key=lambda row: float(row["speedup"]))
            detail = f"{best['recipe']} at {100 * best['density']:.1f} %: {best['speedup']:.2f}x"
            verdict = "**yes**" if best["speedup"] >= 3 else "**no**"
            rows.append(["8192 tokens, head dim 64, 20 %: 3x faster than SDPA", file.parent.name, verdict, detail])
    headings = ["bar", "measured on", "met", "numbers"]
    return table(headings, rows, left=4) if rows else f"{NOT_YET.capitalize()}.\n"


QUALITY_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "density": ("density", lambda value: f"{100 * value:.1f} %"),
    "tile_density": ("in tiles", lambda value: f"{100 * value:.1f} %"),
    "mass": ("mass", lambda value: f"{value:.3f}"),
    "oracle_mass": ("oracle's", lambda value: f"{value:.3f}"),
    "dropped_error": ("error, rest dropped", lambda value: f"{value:.3f}"),
    "output_error": ("error", lambda value: f"{value:.3f}"),
    "rho_error": ("rho off by", lambda value: f"{value:.3f}"),
    "planning_seconds": ("plan, ms", lambda value: f"{1000 * value:.0f}"),
}


def attention_quality_table() -> str:
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
            means = [
                {key: statistics.mean(values) for key in QUALITY_COLUMNS if (values := _values(rows, key))} | {"recipe": name}
                for (name, _), rows in sorted(group.items(), key=lambda item: item[0][1])
            ]
            keys = [key for key in QUALITY_COLUMNS if any(key in mean for mean in means)]
            cells = [[str(mean["recipe"]), *(_known(mean, key, QUALITY_COLUMNS) for key in keys)] for mean in means]
            body = table(["method", *(QUALITY_COLUMNS[key][0] for key in keys)], cells)
            parts.append(f"**{model}**, {words[budget]} ({file.parent.name})\n\n{body}")
    return "\n".join(parts) if parts else f"{NOT_YET.capitalize()}.\n"


def attention_sharpness_table() -> str:
    """How the gain from compensation depends on how sharp the synthetic heads are."""
    forms = {"sharpness": "{:.0f}", "mass": "{:.3f}", "dropped_error": "{:.3f}", "output_error": "{:.4f}", "ratio": "{:.3f}"}
    headings = ["largest logit", "mass read", "error, rest dropped", "error", "ratio", "rho off by"]
    rows = [
        [form.format(row[key]) for key, form in (forms | {"rho_error": "{:.4f}"}).items()]
        for _, document in documents("attention-quality")
        for row in document.get("sharpness", [])
    ]
    return table(headings, rows, left=0) if rows else f"{NOT_YET.capitalize()}.\n"


END_TO_END = ("n", "speedup", "density", "rho", "psnr_median", "psnr_worst", "prompt_accuracy")


def attention_end_to_end_table() -> str:
    """Every recipe of sparse attention on the bundled models, alone and with a cache."""
    columns = COLUMNS | {"density": ("density", _percent), "rho": ("mass read", _percent)}
    parts = []
    for file, document in documents("attention-end-to-end"):
        rows = [row for row in document["rows"] if row.get("n")]
        cells = [[row_name(row), *(_read(row, key, columns) for key in END_TO_END)] for row in rows]
        body = table(["run", *(columns[key][0] for key in END_TO_END)], cells)
        parts.append(f"**{rows[0]['model']}**, {hardware_name(document, file)}\n\n{body}")
    return "\n".join(parts) if parts else f"{NOT_YET.capitalize()}.\n"


def _read(row: Row, key: str, columns: dict[str, tuple[str, Callable[[Any], str]]]) -> str:
    if row.get(key) is None:
        return "identical" if key.startswith("psnr") and (row.get("exact_match") or row["recipe"] == "plain") else ""
    return columns[key][1](row[key])


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


# --- kernels --------------------------------------------------------------------------------------

PRODUCTS = ("wgmma", "tcgen05", "mma")


def kernels_table() -> str:
    """What each kernel needs on each architecture: registers, spills, shared memory, matrix instructions."""
    file = RESULTS / "aot" / "kernels.json"
    if not file.is_file():
        return f"{NOT_YET.capitalize()}.\n"
    found = {(row["kernel"], row["arch"]): row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    archs = list(dict.fromkeys(arch for _, arch in found))
    rows = [
        [name, *(_needs(found[name, arch]) if (name, arch) in found else "" for arch in archs)]
        for name in dict.fromkeys(name for name, _ in found)
    ]
    return table(["kernel", *archs], rows, left=1 + len(archs))


def _needs(row: Row) -> str:
    products = [f"{row['counts'][kind]} {kind}" for kind in PRODUCTS if row["counts"][kind]]
    return ", ".join([f"{row['registers']} registers", f"{row['spills']} spills", f"{row['shared'] // 1024} KiB", *products])


TABLES: dict[str, Callable[[], str]] = {
    "kernels": kernels_table,
    "recipes": recipes_table,
    "bars": bars_table,
    "cache": cache_table,
    "budget": budget_table,
    "results": results_table,
    "models": models_table,
    "conformance": conformance_table,
    "attention-speed": attention_speed_table,
    "attention-bars": attention_bars_table,
    "attention-quality": attention_quality_table,
    "attention-sharpness": attention_sharpness_table,
    "attention-end-to-end": attention_end_to_end_table,
}


# --- files ----------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """`text` with every marked table made anew."""

    def make(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise SystemExit(f"there is no table {name!r}; known: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name]()}{match[3]}"

    return MARK.sub(make, text)


def stale(files: Iterable[Path] | None = None) -> list[Path]:
    """Files whose tables differ from what they should be."""
    return [file for file in files or pages() if filled(file.read_text(encoding="utf-8")) != file.read_text(encoding="utf-8")]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of the README and the docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a table is not up to date")
    check = parser.parse_args().check
    old = stale()
    for file in old:
        name = file.relative_to(ROOT)
        if check:
            print(f"{name}: its tables are not up to date; run python docs/make_tables.py")
        else:
            file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
            print(f"{name}: written")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
