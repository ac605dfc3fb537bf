"""What `hasten bench attention` runs: inputs, dense backends, FlexAttention on the same blocks, and the clock."""

from __future__ import annotations

import importlib
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from hasten.sparse_attn.measure.calibrate import clock_of, wait
from hasten.sparse_attn.measure.roofline import Shape
from hasten.sparse_attn.measure.synthetic import HEADS, heads
from hasten.sparse_attn.measure.trial import Inputs, Trial
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.reference import dense as dense_with_lse
from hasten.sparse_attn.segments import Tokens, video

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Size:
    """One column of the benchmark. heads: of one sample."""

    tokens: int
    head_dim: int
    heads: int

    @property
    def shape(self) -> Shape:
        """For predictions: this one call."""
        return Shape(f"{self.tokens} tokens", self.tokens, 1, self.heads, self.head_dim)


def synthetic(size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Heads of all kinds in turn on the grid of `grid_of`."""
    grid = grid_of(size.tokens)
    kinds = tuple(HEADS)[: size.heads]
    parts = heads(grid, size.head_dim, kinds, seed=seed)
    repeated = (x.repeat(1, -(-size.heads // len(kinds)), 1, 1)[:, : size.heads] for x in parts)
    q, k, v = (x.to(device, dtype).contiguous() for x in repeated)
    return Inputs(q, k, v, Tokens((video(*grid),)))


def grid_of(tokens: int) -> tuple[int, int, int]:
    """Frames, height and width whose product is `tokens` and whose sides are as alike as they can be."""
    best = (1, 1, tokens)
    for frames in range(1, round(tokens ** (1 / 3)) + 1):
        if tokens % frames:
            continue
        rest = tokens // frames
        height = next(h for h in range(int(rest**0.5), 0, -1) if rest % h == 0)
        best = min(best, (frames, height, rest // height), key=lambda grid: (max(grid), -min(grid)))
    return best


LOSSY = ("sage",)
"""Dense backends that round their inputs to 8 bits: they have a row, but nothing is compared with them."""


def dense_backends(inputs: Inputs) -> Iterator[tuple[str, Call]]:
    """Every dense attention there is on this machine that can take `inputs`, by name."""
    if inputs.q.device.type == "cuda":
        from hasten.pipelines.bench.attention_gpu import cuda_backends

        yield from cuda_backends(inputs)
    else:
        yield (
            "sdpa",
            lambda: F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, enable_gqa=_grouped(inputs)),
        )


def dense_output(inputs: Inputs) -> Output:
    """Dense attention and its LSE, which everything is judged by: in half precision on a GPU the flash kernel's."""
    if inputs.q.device.type == "cuda" and inputs.q.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        o, lse = flash(inputs.q, inputs.k, inputs.v, scale=inputs.scale)[:2]
        return Output(o, lse)
    return dense_with_lse(inputs.q, inputs.k, inputs.v, inputs.scale)


def _grouped(inputs: Inputs) -> bool:
    return inputs.heads[1] != inputs.heads[2]


def flex_call(trial: Trial) -> Call | str:
    """FlexAttention, compiled, on the plan of `trial`; or why it cannot be."""
    home = importlib.import_module("hasten.sparse_attn.backends.flex")
    reason = home.not_uniform(trial.plan)
    if reason is not None:
        return str(reason)
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    x, mask = trial.inputs, home.block_mask(trial.plan, trial.inputs.q.device)
    # Each block mask is a graph of its own; after eight of them torch would go on without compiling, which is dense.
    torch.compiler.reset()
    attend: Any = torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)

    def call() -> torch.Tensor:
        found: torch.Tensor = attend(x.q, x.k, x.v, block_mask=mask, scale=x.scale, enable_gqa=_grouped(x))
        return found

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as error:  # noqa: BLE001 - whatever the compiler says is the finding
        return (
            f"FlexAttention does not compile here: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        )
    return call


@dataclass(slots=True)
class Timed:
    """A candidate's calls, seconds each."""

    call: Call
    inner: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(calls: dict[str, Timed], device: torch.device, repeats: int) -> None:
    """Time every call `repeats` times, one after the other in each round, after one round that is not counted.

    Calls that take less than 20 ms are repeated within a round, so that the clock and the launch do not matter.
    """
    for each in calls.values():
        each.inner = 1
        each.inner = max(1, min(20, round(0.02 / max(_once(each, device), 1e-6))))
    for _ in range(repeats):
        for each in calls.values():
            each.seconds.append(_once(each, device))


def _once(each: Timed, device: torch.device) -> float:
    clock = clock_of(device)
    wait(device)
    began = clock()
    for _ in range(each.inner):
        each.call()
    wait(device)
    return (clock() - began) / each.inner
