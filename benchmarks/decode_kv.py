"""Cache policies of causal models on tiny-lm: quality and bytes at 10, 25 and 50 percent; and shared prefixes.

    python benchmarks/decode_kv.py quality     benchmarks/results/cpu-2core/kv-quality-tiny-lm.json, some minutes
    python benchmarks/decode_kv.py shared      benchmarks/results/cpu-2core/kv-shared.json

tiny-lm was trained on texts of up to 256 tokens, so a prompt and what follows it stay within that.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from hasten.atomic import atomic_write
from hasten.pipelines import tiny_models
from hasten.pipelines.decode_kv import bench, bench_shared
from hasten.pipelines.host import hardware

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-2core"
FILES = {"quality": "kv-quality-tiny-lm.json", "shared": "kv-shared.json"}


def quality(count: int) -> list[dict[str, Any]]:
    """The table of docs/decode-kv.md."""
    model, tokenizer = tiny_models.text("tiny-lm")
    return bench.table(model, tokenizer, count=count, given=192, new=32, told=lambda name: print(name, file=sys.stderr, flush=True))


def shared(count: int) -> list[dict[str, Any]]:
    """Rows with a prefix in common, and samples of one prompt of tiny-lm."""
    shapes: list[dict[str, int]] = [{}, {"prefix": 1024}, {"heads": 32, "key_heads": 8, "dim": 128}]
    rows = [{"of": "attention", **bench_shared.attention(batch=2 * count, **shape)} for shape in shapes]
    model, tokenizer = tiny_models.text("tiny-lm")
    prompt = bench.code(tokenizer, 1, 112, 1).prompts
    return [*rows, {"of": "generate", **bench_shared.generation(model, prompt, samples=2 * count, new=8)}]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=FILES)
    parser.add_argument("--count", type=int, default=8, help="texts; half the rows that share a prefix")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = {"quality": quality, "shared": shared}[given.what](given.count)
    document = {
        "command": f"benchmarks/decode_kv.py {given.what}", "model": "tiny-lm", "versions": {"torch": torch.__version__},
        "hardware": hardware("cpu"), "rows": rows,
    }  # fmt: skip
    atomic_write(given.json or RESULTS / FILES[given.what], json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
