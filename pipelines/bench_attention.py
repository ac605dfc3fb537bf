"""`hasten bench attention`: sparse attention against dense attention and FlexAttention, plans in a column of their own.

Inputs are the synthetic heads of `hasten.sparse_attn.synthetic`, all six kinds in turn. All candidates of one size take
turns, so that a machine that slows down slows all of them; times are medians. A row whose output is not what its blocks
say, in float64 on sampled queries, has no speed-up.
"""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from hasten.errors import HastenError
from hasten.sparse_attn.calibrate import measured, wait
from hasten.sparse_attn.compensate import Compensate
from hasten.sparse_attn.density import cost
from hasten.sparse_attn.layout import Identity
from hasten.sparse_attn.layout_kmeans import KMeans
from hasten.sparse_attn.layout_tiles import Tiles
from hasten.sparse_attn.layout_tree import Tree
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.quality import quality, sampled_error
from hasten.sparse_attn.reference import dense as dense_with_lse
from hasten.sparse_attn.roofline import Machine, Shape, predict
from hasten.sparse_attn.score_pooled import Centroid, Pooled
from hasten.sparse_attn.segments import Tokens, video
from hasten.sparse_attn.synthetic import HEADS, heads
from hasten.sparse_attn.trial import Inputs, Method, Trial

Row = dict[str, Any]
Tell = Callable[[str], None]
Call = Callable[[], object]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Error relative to the largest output up to which a row is right: a few roundings of inputs and output."""

FLEX_BLOCK = 128
"""FlexAttention's own block size; ours on the same blocks is the row `blocks`."""

METHODS = (
    Method("blocks", Identity(block=FLEX_BLOCK), Pooled(), block_n=FLEX_BLOCK),
    Method("tiles", Tiles(), Centroid(), Compensate()),
    Method("tree", Tree(), Centroid(), Compensate()),
    Method("clusters", KMeans(), Centroid(), Compensate()),
)
"""The same blocks as FlexAttention; 3-D tiles, equal parts of a tree and k-means clusters, the rest by its means."""


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


@dataclass(slots=True)
class Timed:
    """A candidate's calls, seconds each."""

    call: Call
    inner: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def bench_attention(
    device: torch.device,
    *,
    tokens: Sequence[int] = (4096, 8192, 16_384),
    head_dims: Sequence[int] = (64,),
    densities: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    num_heads: int = 4,
    dtype: torch.dtype = torch.float32,
    methods: Sequence[Method] = METHODS,
    repeats: int = 5,
    flex: bool = True,
    machine: Machine | None = None,
    seconds: float | None = None,
    tell: Tell = lambda _: None,
) -> list[Row]:
    """Rows for every size, density and method, dense attention first; docs/attention-bench.md says what the keys mean.

    machine: rates for the predicted column; None measures this machine. seconds: after so many no new size or density
    is begun, and a row says so.
    """
    began = time.perf_counter()
    rates = machine or measured(device, dtype=dtype)
    rows: list[Row] = []
    for head_dim in head_dims:
        for number in tokens:
            size = Size(number, head_dim, num_heads)
            if seconds is not None and time.perf_counter() - began > seconds:
                rows.append(_named(size, "left out") | {"note": f"more than {seconds:.0f} s had passed"})
                continue
            left = None if seconds is None else seconds - (time.perf_counter() - began)
            rows += at_size(
                device, size, densities, methods, dtype=dtype, repeats=repeats, flex=flex, machine=rates, seconds=left,
                tell=tell,
            )  # fmt: skip
    return rows


def at_size(
    device: torch.device, size: Size, densities: Sequence[float], methods: Sequence[Method], *, dtype: torch.dtype,
    repeats: int, flex: bool, machine: Machine, seconds: float | None = None, tell: Tell = lambda _: None,
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
        if seconds is not None and time.perf_counter() - began > seconds:
            rows.append(_named(size, "left out") | {"density": density, "note": f"more than {seconds:.0f} s had passed"})
            continue
        found = _at_density(size, density, trials, backends[fastest], device, repeats, flex, machine, truth)
        rows += found
        for row in found:
            tell(f"{size.tokens} tokens, D {size.head_dim}, {row['recipe']}, density {row.get('density', 0):.2f}: {_told(row)}")
    return rows


def _at_density(
    size: Size, density: float, trials: dict[str, Trial], dense: Call, device: torch.device, repeats: int, flex: bool,
    machine: Machine, truth: Output,
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


# --- candidates -----------------------------------------------------------------------------------


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
        best = min(best, (frames, height, rest // height), key=lambda grid: max(grid))
    return best


LOSSY = ("sage",)
"""Dense backends that round their inputs to 8 bits: they have a row, but nothing is compared with them."""


def dense_backends(inputs: Inputs) -> Iterator[tuple[str, Call]]:
    """Every dense attention there is on this machine that can take `inputs`, by name."""
    if inputs.q.device.type == "cuda":
        from hasten.pipelines.bench_attention_gpu import cuda_backends

        yield from cuda_backends(inputs)
    else:
        yield "sdpa", lambda: F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, enable_gqa=_grouped(inputs))


def dense_output(inputs: Inputs) -> Output:
    """Dense attention and its LSE: what everything is judged by. In half precision the flash kernel's, which has both."""
    if inputs.q.device.type == "cuda" and inputs.q.dtype != torch.float32:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention(inputs.q, inputs.k, inputs.v, scale=inputs.scale)[:2]
        return Output(o, lse)
    return dense_with_lse(inputs.q, inputs.k, inputs.v, inputs.scale)


def _grouped(inputs: Inputs) -> bool:
    return inputs.heads[1] != inputs.heads[2]


def flex_call(trial: Trial) -> Call | str:
    """FlexAttention, compiled, on the plan of `trial`; or why it cannot be."""
    home = importlib.import_module("hasten.sparse_attn.backend_flex")
    reason = home.not_uniform(trial.plan)
    if reason is not None:
        return str(reason)
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    x, mask = trial.inputs, home.block_mask(trial.plan, trial.inputs.q.device)
    attend = torch.compile(flex.flex_attention, dynamic=False)

    def call() -> torch.Tensor:
        found: torch.Tensor = attend(x.q, x.k, x.v, block_mask=mask, scale=x.scale, enable_gqa=_grouped(x))
        return found

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as error:  # noqa: BLE001 - whatever the compiler says is the finding
        return f"FlexAttention does not compile here: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return call


# --- clock ----------------------------------------------------------------------------------------


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
    wait(device)
    began = time.perf_counter()
    for _ in range(each.inner):
        each.call()
    wait(device)
    return (time.perf_counter() - began) / each.inner


# --- rows -----------------------------------------------------------------------------------------


def _named(size: Size, name: str) -> Row:
    return {"model": f"{size.tokens} tokens, D {size.head_dim}", "recipe": name, "tokens": size.tokens, "head_dim": size.head_dim}


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
    return row | ({"speedup": fastest.median / each.median} if right else {"note": f"wrong by {error:.1e}, no speed-up"})


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
    ours = predict(size.shape, min(1.0, spent.density), machine, planning=0.0, waste=spent.tile_density / spent.density)
    return row | {"speedup": speedup, "ideal_share": speedup * spent.density, "predicted": ours.kernel}


def _told(row: Row) -> str:
    speedup, planned = row.get("speedup"), row.get("planning_fraction")
    if speedup is None:
        return str(row.get("note", ""))
    return f"{speedup:.2f}x, planning {100 * (planned or 0):.1f} % of dense"
