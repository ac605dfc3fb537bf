"""`hasten bench attention`: sparse attention against dense attention and FlexAttention, plans in a column of their own.

Inputs are the synthetic heads of `hasten.sparse_attn.measure.synthetic`, all six kinds in turn. All candidates of one size take
turns, so that a machine that slows down slows all of them; times are medians. A row whose output is not what its blocks
say, in float64 on sampled queries, has no speed-up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hasten.errors import HastenError, UsageError, nearest
from hasten.pipelines.bench.attention_parts import (
    LOSSY,
    Size,
    Timed,
    dense_backends,
    dense_output,
    flex_call,
    synthetic,
    take_turns,
)
from hasten.sparse_attn.density import cost
from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.layouts.tiles import Tiles
from hasten.sparse_attn.layouts.tree import Tree
from hasten.sparse_attn.measure.calibrate import measured
from hasten.sparse_attn.measure.quality import quality, sampled_error
from hasten.sparse_attn.measure.roofline import Machine, predict
from hasten.sparse_attn.measure.trial import Method, Trial
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.scorers.pooled import Centroid, Pooled
from hasten.sparse_attn.stand_ins.compensate import Compensate

Row = dict[str, Any]
Tell = Callable[[str], None]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Error relative to the largest output up to which a row is right: a few roundings of inputs and output."""

FLEX_BLOCK = 128
"""FlexAttention's own block size; ours on the same blocks is the row `blocks`."""

METHODS = (
    Method("blocks", Identity(block=FLEX_BLOCK), Pooled(), block_n=FLEX_BLOCK),
    Method("tiles", Tiles(group=(1, 1, 2)), Centroid(), Compensate()),
    Method("tree", Tree(), Centroid(), Compensate()),
    Method("clusters", KMeans(), Centroid(), Compensate()),
)
"""The same blocks as FlexAttention; 3-D tiles, equal parts of a tree and k-means clusters, the rest by its means."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What is measured where nothing is named. seconds: see `bench_attention`."""

    tokens: tuple[int, ...]
    head_dims: tuple[int, ...]
    densities: tuple[float, ...]
    heads: int
    seconds: float | None


ON_CPU = Defaults((4096, 8192, 16_384), (64,), (0.05, 0.1, 0.2, 0.3, 0.5), 4, None)
ON_GPU = Defaults((16_384, 32_760, 75_600, 118_800), (128, 64), (0.1, 0.2, 0.3), 24, 540.0)
"""On a GPU: a round size, Wan at 480p and 720p, HunyuanVideo at 720p; one call ends within ten minutes."""

FOR_KERNELS = 0.6
"""Share of the time limit that goes to single calls where whole networks are to follow."""


def defaults(device: torch.device) -> Defaults:
    """Of this kind of device."""
    return ON_GPU if device.type == "cuda" else ON_CPU


def named(names: Sequence[str] | None) -> tuple[Method, ...]:
    """The methods called so, all for None. Raises `UsageError` naming the nearest."""
    known = {method.name: method for method in METHODS}
    for name in names or ():
        if name not in known:
            raise UsageError(f"There is no method {name!r}; allowed: {', '.join(known)}.{nearest(name, known)}")
    return tuple(known[name] for name in names) if names else METHODS


def bench_attention(
    device: torch.device,
    *,
    tokens: Sequence[int] = ON_CPU.tokens,
    head_dims: Sequence[int] = ON_CPU.head_dims,
    densities: Sequence[float] = ON_CPU.densities,
    num_heads: int = ON_CPU.heads,
    dtype: torch.dtype = torch.float32,
    methods: Sequence[Method] = METHODS,
    repeats: int = 5,
    flex: bool = True,
    models: bool = False,
    machine: Machine | None = None,
    seconds: float | None = None,
    tell: Tell = lambda _: None,
) -> list[Row]:
    """Rows for every size, density and method, dense attention first; docs/attention-bench.md says what the keys mean.

    machine: rates for the predicted column; None measures this machine. models: whole networks at 720p too. seconds:
    after so many nothing new is begun, and a row says what was left out.
    """
    began = time.perf_counter()
    rates = machine or measured(device, dtype=dtype)
    until = math.inf if seconds is None else seconds * (FOR_KERNELS if models else 1.0)
    rows: list[Row] = []
    for head_dim in head_dims:
        for number in tokens:
            size, left = Size(number, head_dim, num_heads), until - (time.perf_counter() - began)
            if left <= 0:
                rows.append(_named(size, "left out") | {"note": f"{until:.0f} s had passed"})
                continue
            rows += at_size(
                device, size, densities, methods, dtype=dtype, repeats=repeats, flex=flex, machine=rates, seconds=left,
                tell=tell,
            )  # fmt: skip
    if models:
        from hasten.pipelines.bench.attention_gpu import bench_models

        left = math.inf if seconds is None else seconds - (time.perf_counter() - began)
        rows += bench_models(device, dtype=dtype, machine=rates, seconds=left, tell=tell)
    return rows


def at_size(
    device: torch.device, size: Size, densities: Sequence[float], methods: Sequence[Method], *, dtype: torch.dtype,
    repeats: int, flex: bool, machine: Machine, seconds: float = math.inf, tell: Tell = lambda _: None,
) -> list[Row]:  # fmt: skip
    """The rows of one size."""
    inputs, began = synthetic(size, device, dtype), time.perf_counter()
    backends = dict(dense_backends(inputs))
    alone = {name: Timed(call) for name, call in backends.items()}
    take_turns(alone, device, repeats)
    fastest = min((name for name in alone if name not in LOSSY), key=lambda name: alone[name].median)
    truth = dense_output(inputs)
    rows = [_dense_row(size, name, each, alone[fastest], name == fastest, truth) for name, each in alone.items()]
    trials = {method.name: (Trial(method, inputs)) for method in methods}
    for density in densities:
        if time.perf_counter() - began > seconds:
            rows.append(_named(size, "left out") | {"density": density, "note": f"{seconds:.0f} s had passed"})
            continue
        found = _at_density(size, density, trials, backends[fastest], device, repeats, flex, machine, truth)
        rows += found
        for row in found:
            name = f"{size.tokens} tokens, D {size.head_dim}, {row['recipe']}"
            tell(f"{name}, density {row.get('density', 0):.2f}: {_told(row)}")
    return rows


def _at_density(
    size: Size, density: float, trials: dict[str, Trial], dense: Callable[[], object], device: torch.device,
    repeats: int, flex: bool, machine: Machine, truth: Output,
) -> list[Row]:  # fmt: skip
    """All methods at one density, in turns with dense attention."""
    calls, planning, failed = {"dense": Timed(dense)}, dict[str, Timed](), dict[str, str]()
    for name, trial in trials.items():
        try:
            trial.choose(density)  # the first clusters of a run take more passes; steps after it are what is timed
            trial.choose(density)
            calls[name] = Timed(trial.attend)
            planning[name] = Timed(lambda trial=trial: trial.choose(density))  # type: ignore[misc]
        except HastenError as error:
            failed[name] = str(error)
    peer = flex_call(trials["blocks"]) if flex and "blocks" in calls else None
    if isinstance(peer, str):
        failed["flex"] = peer
    elif peer is not None:
        calls["flex"] = Timed(peer)
    take_turns(calls, device, repeats)
    rows = []
    for name, each in calls.items():
        if name != "dense":
            source = trials["blocks" if name == "flex" else name]
            rows.append(_sparse_row(size, name, source, each, calls["dense"], machine, density, truth))
    # After the rows: planning anew moves clusters, and a row's gate must see the blocks that were run.
    take_turns(planning, device, repeats)
    for row in rows:
        made = planning["blocks" if row["recipe"] == "flex" else row["recipe"]].median
        row["planning_seconds"], row["planning_fraction"] = made, made / calls["dense"].median
        if row.get("speedup") is not None:
            row["speedup_with_planning"] = calls["dense"].median / (row["seconds"] + made)
    return rows + [
        _named(size, name) | {"density": density, "control": "peer:flex" if name == "flex" else None, "note": reason}
        for name, reason in failed.items()
    ]


# --- rows -----------------------------------------------------------------------------------------


def _named(size: Size, name: str) -> Row:
    return {
        "model": f"{size.tokens} tokens, D {size.head_dim}",
        "recipe": name,
        "tokens": size.tokens,
        "head_dim": size.head_dim,
    }


def _dense_row(size: Size, name: str, each: Timed, fastest: Timed, first: bool, truth: Output) -> Row:
    """A dense backend: how fast, beside the fastest exact one; gated like the others."""
    out = each.call()
    assert isinstance(out, torch.Tensor)
    error = float((out.float() - truth.o.float()).abs().max() / truth.o.float().abs().max())
    right = name in LOSSY or error <= TOLERANCE[truth.o.dtype]
    row = _named(size, name) | {
        "control": None if first else f"peer:{name}", "density": 1.0, "seconds": each.median, "max_error": error,
        "correct": right, "n": len(each.seconds),
    }  # fmt: skip
    return row | (
        {"speedup": fastest.median / each.median} if right else {"note": f"wrong by {error:.1e}, no speed-up"}
    )


def _sparse_row(
    size: Size, name: str, trial: Trial, each: Timed, dense: Timed, machine: Machine, density: float, truth: Output
) -> Row:
    """One sparse row. Red (an output that its blocks do not explain): no speed-up, but the reason."""
    out = each.call()
    x = trial.inputs
    if isinstance(out, torch.Tensor):  # FlexAttention: the output alone
        out = Output(out, torch.zeros(out.shape[:3], device=out.device))
        error = sampled_error(out, x.q, x.k, x.v, trial.blocks, trial.keep, scale=x.scale)
        judged = {}
    else:
        assert isinstance(out, Output)
        error, found = trial.error(out), quality(out, truth)
        judged = {"mass": float(found.mass.mean()), "rho": float(found.rho.mean())}
    spent, right = cost(trial.plan, size.head_dim), error <= TOLERANCE[out.o.dtype]
    apart = float((out.o.float() - truth.o.float()).norm() / truth.o.float().norm())
    row = _named(size, name) | {
        "control": "peer:flex" if name == "flex" else None, "asked": density, "density": spent.density,
        "tile_density": spent.tile_density, "seconds": each.median, "dense_seconds": dense.median, **judged,
        "output_error": apart, "max_error": error, "correct": right, "n": len(each.seconds),
    }  # fmt: skip
    if not right:
        return row | {"note": f"red: off by {error:.1e} from what its blocks say; no speed-up is given"}
    speedup = dense.median / each.median
    # Plain torch gathers what is read and nothing else; kernels compute whole tiles.
    waste = spent.tile_density / spent.density if x.q.device.type == "cuda" else 1.0
    ours = predict(size.shape, min(1.0, spent.density), machine, planning=0.0, waste=waste)
    return row | {"speedup": speedup, "ideal_share": speedup * spent.density, "predicted": ours.kernel}


def _told(row: Row) -> str:
    speedup, planned = row.get("speedup"), row.get("planning_fraction")
    if speedup is None:
        return str(row.get("note", ""))
    return f"{speedup:.2f}x, planning {100 * (planned or 0):.1f} % of dense"
