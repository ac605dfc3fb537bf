"""A text diffusion student against its teacher: evaluations and right answers on the list tasks, by threshold.

    python benchmarks/dparallel.py --student OUT/student --seeds 5 6 [--count 32] [--above 0.9 0.8 0.7] [--json FILE]
    python benchmarks/dparallel.py --model tiny-lm --student OUT/student --recipe threshold

The student is a folder of `hasten train dparallel`, or of `hasten train block`, put onto the model by plain peft. Seeds 5 and 6 are for choosing; 77
is that of the docs. `oracle` needs to know the text: no rule without that knowledge can write it in fewer evaluations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from hasten.distill.bench.texts import measured, opened
from hasten.pipelines.bench import dllm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-dllm")
    parser.add_argument("--student", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--above", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--recipe", default="dparallel", help="that has a threshold `above`")
    parser.add_argument("--teacher", action="store_true", help="the teacher, too, with each threshold and one token at a time")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(1)
    ways = [f"{told.recipe}:above={above}" for above in told.above]
    players: list[tuple[str, Path | None, list[str]]] = [("teacher", None, [*ways, "sequential"])] if told.teacher else []
    players += [("student", told.student, ways)] if told.student else []
    rows = []
    for player, folder, names in players:
        bench = opened(told.model, folder)
        for seed in told.seeds:
            work = dllm.lists(bench.tokenizer, told.count, seed=seed)
            for name in names:
                rows.append({"player": player, "seed": seed, **measured(bench, work, name)})
                print(json.dumps(rows[-1]), flush=True)
    if told.json:
        told.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
