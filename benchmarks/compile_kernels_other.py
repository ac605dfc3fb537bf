"""As `compile_kernels.py`, for the kernels around attention: k-means, packing, permutation, gradients, tangents,
linear attention.

    python benchmarks/compile_kernels_other.py               # all, into benchmarks/results/aot/kernels_other.json
    python benchmarks/compile_kernels_other.py --only backward   # these rows anew
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.compile_kernels import ARCHS, BLOCKS, HEADS, TOKENS, compensation, empty, plan, qkv, write
from hasten.sparse_attn.kernels import aot, backward, forward_tangent, kmeans, linear, pack, permute
from hasten.sparse_attn.kernels.launch import Launch
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.plan import Output

RESULT = Path(__file__).parent / "results" / "aot" / "kernels_other.json"
Variant = Callable[[int], Launch]


def gradients(dim: int, dtype: torch.dtype, order: int, mask: Mask | None, arch: int) -> Launch:
    """The backward kernel."""
    q, k, v = qkv(dim, dtype)
    output = Output(q, empty(*q.shape[:3], dtype=torch.float32))
    return backward.prepare(q, k, v, plan(mask), 0.1, compensation(dim, order), output, q, None)[1]


def assign(dim: int, dtype: torch.dtype, arch: int) -> Launch:
    """Nearest centroids."""
    x = empty(HEADS[1], TOKENS, dim, dtype=dtype)
    return kmeans.prepare_assign(x, empty(HEADS[1], BLOCKS, dim, dtype=torch.float32))[1]


def means(dim: int, dtype: torch.dtype, arch: int) -> Launch:
    """Means of clusters."""
    x, old = empty(HEADS[1], TOKENS, dim, dtype=dtype), empty(HEADS[1], BLOCKS, dim, dtype=torch.float32)
    return kmeans.prepare_means(x, empty(HEADS[1], BLOCKS + 1), empty(HEADS[1], TOKENS, dtype=torch.int64), old)[1]


def arrange(dim: int, dtype: torch.dtype, arch: int) -> Launch:
    """Keys and values in order."""
    _, k, v = qkv(dim, dtype)
    return permute.prepare(k, v, empty(HEADS[1], TOKENS, dtype=torch.int64), back=False)[2]


def fill(blocks: int, split: bool, arch: int) -> Launch:
    """Chunk lists."""
    whole = empty(HEADS[1], 300, blocks, dtype=torch.bool)
    return pack.prepare(whole, whole if split else None, empty(HEADS[1], blocks + 1), 64, TOKENS)[1]


def branch(dim: int, dtype: torch.dtype, masked: bool, which: int, arch: int) -> Launch:
    """Linear attention: states (0), their sums (1) or outputs (3)."""
    decay = empty(HEADS[2], dtype=torch.float32) if masked else None
    return linear.prepare(*qkv(dim, dtype), "elu", causal=masked, decay=decay)[1][which]


def tangent(dim: int, dtype: torch.dtype, kind: str, arch: int) -> Launch:
    """Attention with its tangent; kind: of its mask, or that keys and values stand still."""
    q, k, v = (empty(1, HEADS[1], TOKENS, dim, dtype=dtype) for _ in range(3))
    keys = empty(1, 1, 1, TOKENS, dtype=torch.bool) if kind == "keys" else None
    tk, tv = (None, None) if kind == "still" else (k, v)
    return forward_tangent.prepare(q, k, v, q, tk, tv, 0.1, arch, mask=keys, causal=kind == "causal")[1]


def variants() -> Iterator[tuple[str, Variant]]:
    """Name of every kernel in every form, and its launch by architecture."""
    bf16, fp32, before = torch.bfloat16, torch.float32, causal(TOKENS, TOKENS)
    for dim in (64, 128):
        for name, dtype in (("bf16", bf16), ("fp32", fp32)):
            yield f"backward {dim} {name}", partial(gradients, dim, dtype, 0, None)
            yield f"backward {dim} {name} order 1", partial(gradients, dim, dtype, 1, None)
            yield f"backward {dim} {name} causal", partial(gradients, dim, dtype, 0, before)
        for kind in ("", "causal", "keys", "still"):
            yield f"tangent {dim} bf16 {kind}".strip(), partial(tangent, dim, bf16, kind)
        yield f"tangent {dim} fp32", partial(tangent, dim, fp32, "")
    for dim in (40, 66, 130, 256):
        yield f"backward {dim} bf16", partial(gradients, dim, bf16, 0, None)
    for dim, (name, dtype) in itertools.product((40, 64, 128, 256), {"bf16": bf16, "fp32": fp32}.items()):
        yield f"assign {dim} {name}", partial(assign, dim, dtype)
    for dim, (name, dtype) in itertools.product((64, 128), {"bf16": bf16, "fp32": fp32}.items()):
        yield f"means {dim} {name}", partial(means, dim, dtype)
        yield f"permute {dim} {name}", partial(arrange, dim, dtype)
    for blocks in (300, 1000, 2000):
        yield f"pack {blocks} blocks", partial(fill, blocks, False)
        yield f"pack {blocks} blocks masked", partial(fill, blocks, True)
    for dim, masked in itertools.product((64, 128, 256), (False, True)):
        for name, which in (("states", 0), ("sums", 1), ("outputs", 3)):
            yield f"linear {name} {dim} bf16{' causal' if masked else ''}", partial(branch, dim, bf16, masked, which)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this; other rows stay")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHS)
    arguments = parser.parse_args()
    rows = []
    print("arch  kernel                            regs  spills  shared KiB  warps  stages  instructions")
    for (name, launch), arch in itertools.product(variants(), arguments.arch):
        if arguments.only not in name:
            continue
        found = aot.compile(launch(arch), arch)
        counts = {key: count for key, count in found.counts.items() if count and not key.startswith("spill")}
        print(
            f"sm_{arch:<4}{name:33} {found.registers:4} {found.spills:6} {found.shared / 1024:11.0f}"
            f" {found.warps:6} {found.stages:7}  {counts}",
            flush=True,
        )
        rows.append({"arch": f"sm_{arch}", "kernel": name, "spills": found.spills, **dataclasses.asdict(found)})
        write(RESULT, [name for name, _ in variants()], rows)


if __name__ == "__main__":
    main()
