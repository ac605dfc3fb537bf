"""What a new token costs with each reader of the cache, and what it loses: time beside SDPA, share read, output error.

    python benchmarks/readers.py [--keys 8192 32768] [--dtype bfloat16] [--threads 1] [--json FILE]

One layer of a model with grouped queries (32 query heads, 8 key heads, head dimension 128) and one sample. Keys are
about one of 64 topics that come in stretches, and each query head asks for one of them, so that there is something to
find; recent keys get no preference, and heads do not agree. The dense time is that of `scaled_dot_product_attention`
on queries packed by key head, which is faster on a CPU than with enable_gqa. Medians of 7 after a warm-up. "prepared"
is the time for the prompt, once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.sparse_attn.text.delta import Delta
from hasten.sparse_attn.text.hierarchical import Tree
from hasten.sparse_attn.text.lookup import Lookup
from hasten.sparse_attn.text.reader import Everything, Reader, Recent
from hasten.sparse_attn.text.votes import Votes

HEADS, KEY_HEADS, DIM, TOPICS, STRETCH = 32, 8, 128, 64, 48
READERS: tuple[Reader, ...] = (Everything(), Recent(), Votes(), Lookup(), Tree(), Delta())


def draw(keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, 32, 65, 128] (the last is the new token's, the others the prompt's), k and v [1, 8, keys, 128]."""
    g = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(KEY_HEADS, TOPICS, DIM, generator=g), dim=-1)
    topic = torch.randint(0, TOPICS, (KEY_HEADS, -(-keys // STRETCH)), generator=g)
    topic = topic.repeat_interleave(STRETCH, 1)[:, :keys, None]
    k = 11 * centres.gather(1, topic.expand(-1, -1, DIM))
    k = k + 0.3 * torch.randn(k.shape, generator=g)
    asked = torch.randint(0, TOPICS, (HEADS, 65, 1), generator=g).expand(-1, -1, DIM)
    q = 11 * centres.repeat_interleave(HEADS // KEY_HEADS, 0).gather(1, asked)
    q = q + 0.3 * torch.randn(q.shape, generator=g)
    v = torch.randn(1, KEY_HEADS, keys, DIM, generator=g)
    return q[None].to(dtype), k[None].to(dtype), v.to(dtype)


def seconds(call: Callable[[], Any]) -> float:
    """Median of 7 after a warm-up."""
    call()
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def rows(keys: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per reader."""
    q, k, v = draw(keys, dtype)
    token, scale = q[:, :, -1:], DIM**-0.5
    packed = token.view(1, KEY_HEADS, HEADS // KEY_HEADS, DIM)
    dense = seconds(lambda: F.scaled_dot_product_attention(packed, k, v))
    truth = Everything().start().attend(token.float(), k.float(), v.float(), None, scale).o
    found = []
    for part in READERS:
        state = part.start()
        start = time.perf_counter()
        state.prepare(q[:, :, :-1], k[:, :, : keys - 1], v[:, :, : keys - 1], None, scale)
        prepared = time.perf_counter() - start
        taken = seconds(lambda state=state: state.attend(token, k, v, None, scale))  # type: ignore[misc]
        out = state.attend(token, k, v, None, scale)
        found.append(
            {
                "reader": part.kind, "keys": keys, "dtype": str(dtype).removeprefix("torch."),
                "density": 1.0 if state.read is None else float(state.read) / (KEY_HEADS * keys),
                "output_error": float((out.o.float() - truth).norm() / truth.norm()),
                "seconds": taken, "speedup": dense / taken, "prepared": prepared,
            }
        )  # fmt: skip
    return found


def main() -> None:
    """Measure and print; write with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with torch.no_grad():
        found = [row for keys in given.keys for row in rows(keys, getattr(torch, given.dtype))]
    for row in found:
        print(
            f"{row['reader']:10} {row['keys']:6} keys, {row['density']:6.1%} read, error {row['output_error']:.3f},"
            f" {1e3 * row['seconds']:6.1f} ms, {row['speedup']:.2f} times as fast, prepared in {row['prepared']:.1f} s"
        )
    if given.json:
        written = {"command": sys.argv, "threads": given.threads, "rows": found}
        given.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
