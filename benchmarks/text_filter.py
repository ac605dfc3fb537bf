"""What trained commit filters are worth on a model's held-out list tasks, and whether they keep their promise.

    python benchmarks/text_filter.py [--model tiny-dllm] [--seeds 6 5] [--count 8]

Ways of decoding: exact match, evaluations, token-layers, agreement with sequential decoding. Filters: the share of a
text's slots of which a wrong token passes at some step of sequential decoding, which is what `--false-commits` bounds (the
questions here are of the split that no training, the filters' own included, has seen). Seed 77 is the docs' and not for tuning.
"""

from __future__ import annotations

import argparse
import json
from statistics import mean
from typing import Any

from hasten.distill.text.filter import collect, risk, score
from hasten.pipelines.bench.dllm import SLOTS, Bench, Workload, lists, table
from hasten.pipelines.recipes import recipe
from hasten.pipelines.text.filters import FILES
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.loading import open_text
from hasten.pipelines.tiny_models import path
from hasten.samplers.filter import Form, load

WAYS = (
    "threshold", "credit", "eb-sampler", "learn2pd", "learn2pd:above=null", "learned-filter", "learned-filter:above=0.995",
)  # fmt: skip
KEYS = ("nfe", "token_layers", "exact_match", "agreement", "position_agreement", "exact_insert", "exact_shuffle")


def ends_cut(measured: Bench, work: Workload, name: str) -> dict[str, Any]:
    """A way of decoding with the blocks and ends of learned-filter, so that only the commit rule differs."""
    found = recipe("learned-filter").model_copy(update={"commit": recipe(name).commit})
    done = measured.generate(found, work)
    assert work.right is not None
    right = [check(measured.answer(text)) for check, text in zip(work.right, done.texts, strict=True)]
    numbers = {"nfe": mean(done.nfe), "token_layers": mean(done.layers), "exact_match": mean(right)}
    return {"recipe": f"{name}, ends cut", "n": len(right), **{key: round(value, 4) for key, value in numbers.items()}}


def promise(measured: Bench, model: str, form: Form, seed: int, count: int) -> dict[str, Any]:
    """One filter on the sequential states of new questions."""
    work = lists(measured.tokenizer, count, seed)
    found = load(path(model) / FILES[form], form)
    traces = collect(measured.host, work.prompts, [SLOTS] * len(work.prompts), recipe("learned-filter"), form=form)
    told = score(found.net, traces, found.above)
    return {"form": form, "n": len(work.prompts), "above": found.above, "false": risk(found.net, traces, found.above), **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-dllm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[6, 5])
    parser.add_argument("--count", type=int, default=8, help="questions of each task")
    options = parser.parse_args()
    measured = Bench(*_opened(options.model))
    for seed in options.seeds:
        work = lists(measured.tokenizer, options.count, seed)
        for row in table(measured, work, WAYS, options.model):
            numbers = {key: round(row[key], 4) for key in KEYS if key in row}
            print(json.dumps({"seed": seed, "n": row["n"], "recipe": row["recipe"], **numbers, "note": row.get("note", "")}), flush=True)
        for name in ("threshold", "credit"):
            print(json.dumps({"seed": seed, **ends_cut(measured, work, name)}), flush=True)
        for form in FILES:
            print(json.dumps({"seed": seed, **promise(measured, options.model, form, seed, options.count)}), flush=True)


def _opened(model: str) -> tuple[Any, Any]:
    network, tokenizer = open_text(model, None, "cpu")
    return choose(network, tokenizer), tokenizer


if __name__ == "__main__":
    main()
