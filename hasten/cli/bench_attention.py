"""`hasten bench attention`: sparse attention against dense attention on this machine."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from hasten.cli.options import Device, Dtype
from hasten.cli.output import JsonOption, Output

COLUMNS = {
    "tokens": "tokens",
    "head_dim": "D",
    "recipe": "method",
    "control": "control",
    "density": "density",
    "tile_density": "in tiles",
    "mass": "mass",
    "rho": "rho",
    "output_error": "output error",
    "seconds": "seconds",
    "planning_seconds": "planning",
    "planning_fraction": "of dense",
    "speedup": "speed-up",
    "speedup_with_planning": "with planning",
    "ideal_share": "of the ideal",
    "predicted": "predicted",
    "bytes_held": "peak",
    "n": "runs",
    "note": "note",
}
"""Row key -> heading; see docs/attention-bench.md for what they mean."""


def attention(
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="May be repeated. Default: 4096 8192 16384; on a GPU 16384 to 118800.", min=64
        ),
    ] = None,
    head_dim: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="May be repeated. Default: 64; on a GPU 64 and 128.", min=6, max=256),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X", help="May be repeated. Default: 0.05 to 0.5; on a GPU 0.1 0.2 0.3.", min=0.001, max=1.0
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="blocks, tiles, tree, clusters. May be repeated. Default: all."),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(metavar="N", help="Heads of each size. Default: 4; on a GPU 24.", min=1, max=128)
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Rounds in which all candidates take turns.", min=1)] = 5,
    flex: Annotated[bool, typer.Option(help="FlexAttention on the same blocks, compiled, too.")] = True,
    models: Annotated[
        bool, typer.Option(help="On a GPU: steps of HunyuanVideo and Wan 14B at 720p with random weights, too.")
    ] = True,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="Begin nothing new after this. Default: no limit; on a GPU 540.", min=1.0),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: JsonOption = None,
) -> None:
    """Sparse attention against the fastest dense one and FlexAttention: speed, planning, and whether it is right."""
    output = Output("bench attention", json)
    with output.open():
        import torch

        from hasten.pipelines.bench import attention as bench
        from hasten.pipelines.loading import pick_device, pick_dtype
        from hasten.sparse_attn.measure.calibrate import clock_of

        where = pick_device(device)
        usual = bench.defaults(where)
        with torch.no_grad():
            rows = bench.bench_attention(
                where,
                tokens=tokens or usual.tokens,
                head_dims=head_dim or usual.head_dims,
                densities=density or usual.densities,
                num_heads=heads or usual.heads,
                dtype=pick_dtype(dtype, where),
                methods=bench.named(method),
                repeats=repeats,
                flex=flex,
                models=models and where.type == "cuda",
                seconds=seconds or usual.seconds,
                tell=output.note,
            )
        output.table(rows, COLUMNS if all("tokens" in row for row in rows) else {"model": "network"} | COLUMNS)
        clock = "processor time" if clock_of(where) is time.process_time else "wall clock"
        output.finish([_short(row) for row in rows], repeats=repeats, clock=clock)
        red = [
            row
            for row in rows
            if row.get("correct") is False and not str(row.get("control") or "").startswith("peer")
        ]
        if red:
            output.warn(f"{len(red)} rows are red: their output is not what their blocks say.")
            raise typer.Exit(1)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers in as many digits as mean something."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
