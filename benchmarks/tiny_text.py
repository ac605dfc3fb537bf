"""How good the bundled text models are on their own: exact match on unseen list tasks, loss on unseen sources.

    python benchmarks/tiny_text.py [--models tiny-dllm ...] [--count 200] [--code code.safetensors]

Decoding is sequential: one token a forward, the most certain place first. `--code` is what a training wrote beside its
checkpoints; the loss on sources depends on the version of Python they came from, which the model's card names.
Writes `benchmarks/results/cpu-2core/tiny_text.json`, from which the table in docs/tiny-models.md is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hasten.distill.pretrain import text_judge
from hasten.pipelines import tiny_models
from hasten.pipelines.host import hardware
from hasten.pipelines.list_tasks import DETERMINISTIC

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core" / "tiny_text.json"


def measure(name: str, count: int, code: Path | None) -> dict[str, Any]:
    """One result row: exact match of each task, the worst of the deterministic ones, and the losses."""
    card = tiny_models.card(name)
    model, tokenizer = tiny_models.text(name)
    rows = text_judge.tasks_rows(model, tokenizer, count)
    match = {row["task"]: row["exact_match"] for row in rows}
    learned = code is not None and card["data"]["code"] is not None
    return {
        "model": name,
        "recipe": "sequential",
        "n": count,
        "steps_trained": card["steps"]["text"],
        "parameters": sum(card["parameters"].values()),
        "attention": card["settings"]["model"]["attention"],
        "exact_match": round(statistics.mean(match.values()), 4),
        "exact_match_deterministic_worst": min(match[task] for task in DETERMINISTIC),
        **{f"exact_match_{task}": value for task, value in match.items()},
        "nll_deterministic": round(statistics.mean(r["nll"] for r in rows if r["task"] in DETERMINISTIC), 4),
        **{f"nll_above_{r['task']}": round(r["nll"] - r["closed_form"], 4) for r in rows},
        "code_nats": text_judge.code_row(model, load_file(code)["validation"])["nats_per_token"] if learned else None,
    }


def main() -> None:
    text_models = [name for name in tiny_models.names() if tiny_models.card(name)["kind"] == "text"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=text_models)
    parser.add_argument("--count", type=int, default=200, help="questions per task")
    parser.add_argument("--code", type=Path, help="code.safetensors of a training")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows.append(measure(name, options.count, options.code))
        print(json.dumps(rows[-1]), flush=True)
    earlier = json.loads(options.json.read_text())["rows"] if options.json.is_file() else []
    rows = [row for row in earlier if row["model"] not in options.models] + rows
    document = {
        "command": "tiny_text",
        "versions": {"torch": torch.__version__},
        "hardware": hardware("cpu"),
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
