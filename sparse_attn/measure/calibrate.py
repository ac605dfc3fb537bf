"""The rates of this machine, for predictions: a few calls of what will be run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.sparse_attn.attention import sparse_attention
from hasten.sparse_attn.blocks import Blocks
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.measure.roofline import Machine
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.plan import Plan
from hasten.sparse_attn.segments import plain

DENSITY = 0.25
"""At which the sparse kernel is timed; its rate hardly depends on it."""


def measured(
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    repeats: int = 3,
) -> Machine:
    """Rates of `device` (less than a second): measure once per session and hand the result on.

    What is not given: 2 heads of 64 on 2048 tokens in float32; on a GPU, which smaller calls would not fill, 16 heads
    of 128 on 8192 tokens in bfloat16. Dense attention is PyTorch's. Larger calls are somewhat more efficient, both
    dense and sparse. The overhead is what a sparse call on 64 tokens takes.
    """
    large = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if large else torch.float32)
    tokens, heads, head_dim = (
        tokens or (8192 if large else 2048),
        heads or (16 if large else 2),
        head_dim or (128 if large else 64),
    )
    q, k, v = (torch.randn(1, heads, tokens, head_dim, device=device, dtype=dtype) for _ in range(3))
    work = 4.0 * heads * tokens * tokens * head_dim
    dense = work / seconds_of(lambda: F.scaled_dot_product_attention(q, k, v), device, repeats)
    few = [x[:, :, :64].contiguous() for x in (q, k, v)]
    tiny, some = scattered(few[0], 1.0), scattered(q, DENSITY)
    overhead = seconds_of(lambda: sparse_attention(few[0], few[1], few[2], tiny), device, repeats)
    taken = seconds_of(lambda: sparse_attention(q, k, v, some), device, repeats) - overhead
    sparse = work * DENSITY / max(taken, 0.1 * overhead)
    rows, columns = (8192, 4096) if large else (2048, 1024)
    a, b = (torch.randn(rows, columns, device=device, dtype=dtype) for _ in range(2))
    linear = 2.0 * rows * rows * columns / seconds_of(lambda: a @ b.T, device, repeats)
    big = torch.zeros(2**28 if large else 2**24, device=device)
    bandwidth = 2 * big.numel() * 4 / seconds_of(big.clone, device, repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Machine(name, dense, sparse, linear, bandwidth, overhead, source="measured here")


def scattered(q: Tensor, density: float, block: int = 128) -> Plan:
    """A plan for q [B, H, S, D] that reads about `density` of the blocks, spread evenly and other ones in each row."""
    tokens = plain(q.shape[2])
    blocks: Blocks = Identity(block=block).start().blocks(q, q, tokens, tokens)
    rows = blocks.q.count
    order = torch.arange(rows, device=q.device)
    # A multiple of an odd number: a permutation of the columns that shifts from row to row.
    places = (order[None, :] * 7 + order[:, None] * 3) % rows
    keep = places < max(1, round(density * rows))
    keep = keep.expand(q.shape[0] * q.shape[1], rows, rows)
    return pack(blocks, blocks.force(keep), (q.shape[0], q.shape[1], q.shape[1]))


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call after one that is not counted; waits for the device."""
    taken, clock = [], clock_of(device)
    for number in range(repeats + 1):
        began = clock()
        call()
        wait(device)
        if number:
            taken.append(clock() - began)
    return statistics.median(taken)


def clock_of(device: torch.device) -> Callable[[], float]:
    """The wall clock; with one thread on a processor the processor's time, which other programs do not lengthen."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def wait(device: torch.device) -> None:
    """Until everything given to the device is done. Only for measurements."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
