"""Tile sizes, warps and pipeline stages by architecture, head dimension and dtype: a table, not a search at run time.

Every row was chosen by compiling for that architecture: no register spills, matrix instructions in the loop
(tests/sparse_attn/test_kernels_compile.py holds it; benchmarks/compile_kernels.py prints registers and memory).
A search at run time would compile a dozen variants for every new head dimension, and is right on an idle GPU only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.errors import UsageError
from hasten.sparse_attn.kernels.launch import power

SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory that one program may have, by compute capability (CUDA programming guide, table of compute
capabilities). Unknown ones count as the smallest."""

MAX_STAGES = 3
"""Chunks in flight: more bought no registers back and no instruction in the compiled loops."""


@dataclass(frozen=True, slots=True)
class Config:
    """How one kernel is launched. block_m: queries per program; block_n: keys that it reads at once; block_c: blocks
    that one step compensates for; tma: full chunks are read by the copy engine of sm_90 and later."""

    block_m: int
    block_n: int
    block_c: int
    warps: int
    stages: int
    tma: bool = False


def forward_config(
    arch: int, head_dim: int, value_dim: int, dtype: torch.dtype, block_m: int, block_n: int, *,
    order: int = 0, tree: bool = False,
) -> Config:  # fmt: skip
    """For `forward.forward`. block_m, block_n: of the plan. order: of the compensation, 0 for none. tree: a draft tree
    is read element by element, which takes registers from everything else (and there are few such queries).

    Raises `UsageError` where block_n is larger than 256.
    """
    wide, most = max(power(head_dim), power(value_dim)), chunk(block_n)
    if dtype == torch.float32:  # three TF32 products for one hold both factors in two halves: few rows fit
        rows, columns, blocks, warps = 16, 32, 16, 8
    elif wide <= 128:
        rows, columns, blocks, warps = 128, 128 if wide <= 64 else 64, 64 if wide <= 64 else 32, 8
    else:
        rows, columns, blocks, warps = 64, 64 if order == 0 else 32, 16, 8
    if most > columns and arch < 90:  # counting the parts of a chunk takes the last registers of sm_80
        blocks = min(blocks, 16)
    if tree:
        rows, columns, warps = min(rows, 64), 16, 8 if dtype == torch.float32 else 4
    if power(block_m) < 64 <= rows:
        warps = 4
    rows, columns = min(rows, power(block_m)), min(columns, most)
    return Config(rows, columns, blocks, warps, stages(arch, wide, dtype.itemsize, rows, columns))


def decode_config(arch: int, head_dim: int, value_dim: int, dtype: torch.dtype, rows: int, block_n: int) -> Config:
    """For `decode.decode`. rows: queries that share one key head, times their number."""
    wide, size, block_n = max(power(head_dim), power(value_dim)), dtype.itemsize, chunk(block_n)
    tile = min(64, power(rows))
    warps = 8 if dtype == torch.float32 else 4
    return Config(tile, block_n, 0, warps, stages(arch, wide, size, tile, block_n))


def tangent_config(arch: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> Config:
    """For `forward_tangent.forward_tangent`, which holds two sums of outputs and reads two tiles of keys and of values."""
    wide, size = max(power(head_dim), power(value_dim)), dtype.itemsize
    if dtype == torch.float32:
        rows, columns, warps = 16, 32, 8
    else:
        rows, columns, warps = (128, 64 if arch >= 90 else 32, 8) if wide <= 64 else (64, 32, 8)
    return Config(rows, columns, 0, warps, stages(arch, 2 * wide, size, rows, columns))


def stages(arch: int, wide: int, size: int, rows: int, block_n: int) -> int:
    """Chunks in flight that shared memory has room for, with the queries of a program."""
    if arch == 0:
        return 1
    room = SHARED.get(arch, min(SHARED.values())) * 1024 - rows * wide * size
    return max(1, min(MAX_STAGES, room // (2 * block_n * wide * size)))


def chunk(block_n: int) -> int:
    """Keys that a kernel reads at once for chunks of up to block_n. Raises `UsageError` beyond what fits on a chip."""
    if not 1 <= block_n <= 256:
        raise UsageError(f"A plan with chunks of {block_n} keys has no kernel; allowed are 1 to 256. Pack it again.")
    return power(block_n)
