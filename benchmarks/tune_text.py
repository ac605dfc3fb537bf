"""The tuner on text diffusion: its recipe against every single-method preset, at one budget, on questions that nobody tuned on.

    python benchmarks/tune_text.py [--model tiny-dllm] [--budget 99%] [--time 10m] [--tested 384] [--study FOLDER] [--out FILE]

Questions are the list tasks' (no training has seen them): those of seed 6 are tuned on, two in three of them held out by the
tuner itself; those of seed 77 are met here for the first time, by every recipe. A recipe is given up once it has lost more
answers than one within the budget would lose in one case of a hundred; its row says after how many. Seconds are of the
processor where one thread does everything. Writes `benchmarks/results/cpu-2core/tune-text-MODEL.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.pipelines import list_tasks
from hasten.pipelines.bench import dllm
from hasten.pipelines.host import hardware
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.tune.goal import seconds_of
from hasten.pipelines.tune.text_result import TextTuned
from hasten.pipelines.tune.text_run import tune_text
from hasten.pipelines.tune.text_trials import Right, TextBench
from hasten.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core"
TUNED_ON, TESTED_ON = 6, 77
"""Seeds of questions."""
TIMED = 4


def questions(count: int, seed: int) -> list[str]:
    """`count` different questions of all tasks."""
    asked = dict.fromkeys(question.prompt for question in list_tasks.questions(2 * count, seed, held_out=True))
    return list(asked)[:count]


def right(prompt: str, answer: str) -> bool:
    question = list_tasks.read(prompt)
    return question is not None and question.right(answer)


def presets() -> dict[str, Recipe]:
    """Every published way of decoding and every cache alone, ours, and fewer evaluations with the surest slots."""
    fewer = [f"llada:steps={steps}" for steps in (12, 8)]
    names = [*fewer, *dllm.DECODING, *(f"sequential+{name}" for name in dllm.CACHES if name != "exact-cache"), "fast-dllm", *dllm.OURS]
    return {name: find_recipe(name) for name in names}


def compared(pipe: Any, tuned: TextTuned, prompts: list[str], batch: int, check: Right) -> list[dict[str, Any]]:
    """The tuned recipe and the presets on new questions, sequential decoding first."""
    call = {"max_new_tokens": dllm.SLOTS, "temperature": 0.0}
    bench = TextBench(pipe, prompts, call, batch, check)
    wanted = ({"tuned": tuned.recipe} if tuned.recipe is not None else {}) | presets()
    rows = []
    for name, recipe in {"sequential": find_recipe("sequential"), **wanted}.items():
        measured = bench.measure(name, recipe, None if name == "sequential" else tuned.goal, again=TIMED)
        rows.append(tuned.row(measured) | {"keeps": measured.whole and tuned.goal.met(measured.share)})
        row = rows[-1]
        said = "refused" if not row["n"] else f"{row['speedup']:.2f}x {row['of_sequential']:.1%} {row['agreement']:.1%} of {row['n']}"
        print(f"{name}: {said} {row['note'] or ''}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-dllm")
    parser.add_argument("--budget", default="99%")
    parser.add_argument("--time", default="10m")
    parser.add_argument("--tested", type=int, default=384)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--study", type=Path, default=Path("tune-text-study"))
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    out = given.out or RESULTS / f"tune-text-{given.model}.json"
    pipe = hasten.load(given.model)
    tuned = tune_text(
        pipe, questions(900, TUNED_ON), given.budget, seconds=seconds_of(given.time), study=given.study, model=given.model,
        batch=given.batch, say=lambda text: print(text, flush=True),
    )  # fmt: skip
    print("\n".join(tuned.sentences()), flush=True)
    unseen = [prompt for prompt in questions(given.tested + 100, TESTED_ON) if prompt not in set(questions(900, TUNED_ON))]
    rows = compared(pipe, tuned, unseen[: given.tested], given.batch, right)
    result = {
        "model": given.model, "budget": str(tuned.goal), "time": given.time, "batch": given.batch, "hardware": hardware("cpu"),
        "torch": torch.__version__, "recipe": tuned.recipe and tuned.recipe.model_dump(), "sentences": tuned.sentences(),
        "trials": len(tuned.trials), "given_up": len(tuned.given_up), "tuning": tuned.rows(), "rows": rows,
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
