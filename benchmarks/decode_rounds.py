"""What a round of drafted decoding costs beside a step of transformers' own `generate`, on the bundled models.

    python benchmarks/decode_rounds.py [--repeats 30] [--models tiny-lm tiny-draft] [--json FILE]

One process, and plain and drafted calls in turn, so that both have the same machine; the random prompts of `noise`, where no
draft pays. Processor seconds of whole calls; ratios are medians over pairs of neighbours, above 1 where hasten takes less.

    idle       a round that drafts nothing : a plain step
    goodput    the same, where the pace decides (`look-up` as it is); drafts that it tries now and then are in it
    chain, tree   seconds of a round with up to 10 drafts / of a plain step: how much dearer it is
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hasten
from hasten.pipelines.bench.decode_texts import noise
from hasten.pipelines.host import hardware
from hasten.pipelines.tiny_models import text
from hasten.recipe import Recipe
from hasten.report_forms import installed_versions
from hasten.samplers.decode.pace import Goodput, Steady
from hasten.samplers.drafters.look_up import LookUp

NEW = 64
NEVER = 2
"""An end token that is never written, so that all calls are equally long and yet look for an end."""
MODES: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 40}}
IDLE = {"idle": Steady(nodes=0), "goodput": Goodput()}
DRAFTING = {"chain": LookUp(width=1), "tree": LookUp()}


def clocked(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def beside(plain: Callable[[], Any], ours: Callable[[], Any], repeats: int) -> list[tuple[float, float]]:
    """Seconds of neighbours (plain, ours), each going first in turn; the first pair warms up."""
    found = []
    for number in range(repeats + 1):
        if number % 2:
            second = clocked(ours)
            found.append((clocked(plain), second))
        else:
            found.append((clocked(plain), clocked(ours)))
    return found[1:]


def rows(name: str, repeats: int) -> list[dict[str, Any]]:
    model, tokenizer = text(name)
    found = []
    for batch in (1, 4):
        inputs = next(noise(tokenizer, batch).batches(batch, 0))
        for mode, more in MODES.items():
            call = {**inputs, **more, "max_new_tokens": NEW, "eos_token_id": NEVER, "pad_token_id": 0}

            def generate(call: dict[str, Any] = call) -> Any:
                return model.generate(**call)

            def plain(call: dict[str, Any] = call) -> Any:
                return type(model).generate(model, **call)

            row: dict[str, Any] = {"model": name, "batch": batch, "mode": mode, "n": repeats}
            for what, pace in IDLE.items():
                with hasten.accelerate(model, Recipe(draft=LookUp(), pace=pace)):
                    pairs = beside(plain, generate, repeats)
                row[what] = statistics.median(base / ours for base, ours in pairs)
            row["plain_ms"] = 1e3 * statistics.median(base for base, _ in pairs) / NEW
            for what, drafter in DRAFTING.items():
                with hasten.accelerate(model, Recipe(draft=drafter, pace=Steady())) as run:
                    pairs = beside(plain, generate, max(3, repeats // 3))
                    rounds = len(run.report().rounds) / (len(pairs) + 1)
                row[what] = statistics.median((ours / rounds) / (base / NEW) for base, ours in pairs)
            found.append(row)
            print(
                f"{name:<11} batch {batch} {mode:<8} plain {row['plain_ms']:.2f} ms | idle {row['idle']:.3f}x goodput {row['goodput']:.3f}x"
                f" | a drafting round: chain {row['chain']:.2f}, tree {row['tree']:.2f} plain steps", flush=True,
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--models", nargs="+", default=["tiny-lm", "tiny-draft"])
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    asked = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="hasten: ")
    found = [row for name in asked.models for row in rows(name, asked.repeats)]
    if asked.json:
        about = {"command": "benchmarks/decode_rounds.py", "versions": installed_versions(), "hardware": hardware("cpu")}
        asked.json.write_text(json.dumps(about | {"rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
