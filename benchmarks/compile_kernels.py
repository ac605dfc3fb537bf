"""Registers, spills, shared memory and instructions of every kernel on GPUs that are not here. Needs no GPU.

    python benchmarks/compile_kernels.py                     # all, into benchmarks/results/aot/kernels.json
    python benchmarks/compile_kernels.py --only "forward 128"   # these rows anew

The arguments are those that a real launch passes, at the size of a Wan 2.1 480p layer (32 760 tokens, 12 heads).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from hasten.atomic import atomic_write
from hasten.sparse_attn.kernels import aot, columns, decode, forward
from hasten.sparse_attn.kernels.launch import Launch
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.plan import Compensation, Plan
from hasten.sparse_attn.text.decode import Work

ARCHS = (80, 90, 100)
TOKENS, BLOCKS = 32_760, 1000
HEADS = (1, 12, 12)
RESULT = Path(__file__).parent / "results" / "aot" / "kernels.json"


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """A tensor with no memory behind it: compiling needs types and strides only."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def plan(mask: Mask | None = None, block_n: int = 64) -> Plan:
    """A plan of the right types; its numbers do not matter here."""
    perm = empty(HEADS[1], TOKENS, dtype=torch.int64)
    tiles, rows, chunks = [empty(4096)] * 4, [empty(4096)] * 3, [empty(10**6)] * 2
    return Plan(HEADS, TOKENS, TOKENS, 128, block_n, perm, perm, *tiles, *rows, *chunks, mask)


def compensation(dim: int, order: int) -> Compensation | None:
    """Tables of the right types."""
    if order == 0:
        return None
    means = empty(HEADS[2], BLOCKS, dim, dtype=torch.float32)
    sizes = empty(HEADS[2], BLOCKS, dtype=torch.float32)
    return Compensation(means, means, sizes, empty(4096, BLOCKS, dtype=torch.bool), means if order == 2 else None)


def qkv(dim: int, dtype: torch.dtype, new: int = TOKENS, heads: int = HEADS[1]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one layer."""
    keys = empty(1, HEADS[2], TOKENS, dim, dtype=dtype)
    return empty(1, heads, new, dim, dtype=dtype), keys, keys


def attend(dim: int, dtype: torch.dtype, order: int, mask: Mask | None, block_n: int, arch: int) -> Launch:
    """The forward kernel, with compensation of some order, with a mask."""
    q, k, v = qkv(dim, dtype)
    return forward.prepare(q, k, v, plan(mask, block_n), 0.1, compensation(dim, order), arch)[1]


def sums(dim: int, dtype: torch.dtype, arch: int) -> Launch:
    """The kernel of column sums."""
    q, k, _ = qkv(dim, dtype)
    return columns.prepare(q, k, empty(*q.shape[:3], dtype=torch.float32), plan(), 0.1, arch)[1]


def pieces(dim: int, dtype: torch.dtype, mask: Mask | None, which: int, arch: int) -> Launch:
    """The kernel that decodes pieces (which = 0) or the one that merges them (1); 8 query heads per key head."""
    q, k, v = qkv(dim, dtype, 1, 8 * HEADS[2])
    lists, chunks = empty(264), empty(512 * HEADS[2])
    work = Work(lists, lists, lists, empty(HEADS[2] + 1), chunks, chunks, 64, 4)
    return decode.prepare(q, k, v, work, 0.1, mask, arch)[1][which]


def merge(dim: int, dtype: torch.dtype, arch: int) -> Launch:
    """The kernel that merges whole outputs."""
    q, _, _ = qkv(dim, dtype)
    return decode.prepare_merge([(q, empty(*q.shape[:3], dtype=torch.float32))] * 3)[2]


def variants() -> Iterator[tuple[str, Callable[[int], Launch]]]:
    """Name of every kernel in every form, and its launch by architecture."""
    bf16, fp32, before = torch.bfloat16, torch.float32, causal(TOKENS, TOKENS)
    for dim in (64, 128):
        for order in (0, 1, 2):
            yield f"forward {dim} bf16 order {order}", partial(attend, dim, bf16, order, None, 64)
        tree = Mask(None, 0, 0, empty(TOKENS, 64, dtype=torch.bool))
        yield f"forward {dim} bf16 causal", partial(attend, dim, bf16, 0, before, 64)
        yield f"forward {dim} bf16 tree", partial(attend, dim, bf16, 0, tree, 64)
        yield f"forward {dim} bf16 causal order 2", partial(attend, dim, bf16, 2, before, 64)
        yield f"forward {dim} bf16 chunks of 128", partial(attend, dim, bf16, 1, None, 128)
        yield f"forward {dim} fp16", partial(attend, dim, torch.float16, 0, None, 64)
        yield f"forward {dim} fp32 order 0", partial(attend, dim, fp32, 0, None, 64)
        yield f"forward {dim} fp32 order 2", partial(attend, dim, fp32, 2, None, 64)
    for dim, order in ((40, 2), (96, 0), (256, 0), (256, 2)):
        yield f"forward {dim} bf16 order {order}", partial(attend, dim, bf16, order, None, 64)
    for dim, name, dtype in ((64, "bf16", bf16), (128, "bf16", bf16), (128, "fp32", fp32)):
        yield f"decode {dim} {name}", partial(pieces, dim, dtype, None, 0)
        yield f"decode {dim} {name} causal", partial(pieces, dim, dtype, causal(1, TOKENS), 0)
        yield f"merge pieces {dim} {name}", partial(pieces, dim, dtype, None, 1)
        yield f"merge {dim} {name}", partial(merge, dim, dtype)
        yield f"columns {dim} {name}", partial(sums, dim, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this; other rows stay")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHS)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("arch  kernel                           regs  spills  shared KiB  warps  stages  instructions")
    for (name, launch), arch in itertools.product(variants(), arguments.arch):
        if arguments.only not in name:
            continue
        started = time.perf_counter()
        found = aot.compile(launch(arch), arch)
        took = time.perf_counter() - started
        counts = {key: count for key, count in found.counts.items() if count and not key.startswith("spill")}
        print(
            f"sm_{arch:<4}{name:32} {found.registers:4} {found.spills:6} {found.shared / 1024:11.0f} {found.warps:6}"
            f" {found.stages:7}  {counts} ({took:.1f} s)",
            flush=True,
        )
        rows.append({"arch": f"sm_{arch}", "kernel": name, "spills": found.spills, **dataclasses.asdict(found)})
        write(RESULT, [name for name, _ in variants()], rows)


def write(file: Path, names: list[str], rows: list[dict[str, Any]]) -> None:
    """Put new rows into the results, in the order of the variants' names; rows of another Triton go."""
    versions = {"triton": triton.__version__}
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = old["rows"] if old.get("versions") == versions else []
    found = {(row["kernel"], row["arch"]): row for row in (*known, *rows)}
    kept = [found[name, f"sm_{arch}"] for name in names for arch in ARCHS if (name, f"sm_{arch}") in found]
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps({"versions": versions, "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
