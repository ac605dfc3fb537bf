"""`hasten bench`: the measurements behind the numbers in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.atomic import atomic_write
from hasten.cli.options import Device, Dtype
from hasten.cli.output import JsonOption, Output
from hasten.errors import UsageError

app = typer.Typer(help="Measure speed and quality.", no_args_is_help=True)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A bundled model, a diffusers folder, or a hub id.")
]


@app.command("overhead")
def overhead(
    model: Model = "tiny-video",
    repeats: Annotated[int, typer.Option(metavar="N", help="Pairs of runs.", min=3)] = 9,
    steps: Annotated[int, typer.Option(metavar="N", help="Solver steps of each run.", min=2)] = 6,
    device: Device = None,
    dtype: Dtype = None,
    json: JsonOption = None,
) -> None:
    """What an accelerate() with nothing enabled costs; it must be bit-identical."""
    output = Output("bench overhead", json)
    with output.open():
        from hasten.pipelines.bench.overhead import bench_overhead
        from hasten.pipelines.loading import open_pipeline
        from hasten.pipelines.tiny_models import call_defaults

        pipe = open_pipeline(model, device=device, dtype=dtype, quiet=True)
        row = {"model": model} | bench_overhead(pipe, call_defaults(pipe), repeats=repeats, steps=steps)
        output.table([row])
        output.finish([row])
        if not row["identical"]:
            output.warn("The watched run is not bit-identical to the plain one.")
            raise typer.Exit(1)


@app.command("recipes")
def recipes(
    model: Model = "tiny-video",
    recipe: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="May be repeated. Default: balanced, and fast without a student.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One prompt a line. Default: 16 of our own.")
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", help="How many of the prompts.", min=1)] = 16,
    seeds: Annotated[int, typer.Option(metavar="N", help="Seeds per prompt.", min=1)] = 2,
    converged: Annotated[
        int, typer.Option(metavar="N", help="Steps of the converged solution.", min=1)
    ] = 200,
    oracle: Annotated[bool, typer.Option(help="Search the best schedule too.")] = True,
    peers: Annotated[bool, typer.Option(help="Run other libraries too.")] = True,
    device: Device = None,
    dtype: Dtype = None,
    json: JsonOption = None,
) -> None:
    """Recipes against the plain run, with controls, oracle and peers in the same table."""
    output = Output("bench recipes", json)
    with output.open():
        from hasten.cli.prompts import collect
        from hasten.pipelines.bench.measure import bench_recipes
        from hasten.pipelines.bench.shots import Sample
        from hasten.pipelines.generate import makes_video

        pipe, call = _bundled("recipes", model, device, dtype)
        texts = [item.text for item in collect([], prompts, 0)] if prompts else own_prompts(makes_video(pipe))
        samples = [Sample(text, seed) for text in texts[:count] for seed in range(seeds)]
        rows = bench_recipes(
            pipe,
            call,
            samples,
            recipe or ["balanced", "fast:student=false"],
            model=model,
            converged_steps=converged,
            with_oracle=oracle,
            with_peers=peers,
            tell=output.note,
        )
        output.table(rows)
        output.finish(rows, prompts=texts[:count], seeds=list(range(seeds)))


@app.command("cache")
def cache(
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A bundled model, or a folder with hasten.json.")
    ] = "tiny-video",
    prompts: Annotated[
        int, typer.Option(metavar="N", help="How many of our own prompts.", min=1, max=16)
    ] = 16,
    seeds: Annotated[int, typer.Option(metavar="N", help="Seeds per prompt.", min=1)] = 2,
    presets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A recipe, or one with arguments: easycache:limit=0.1. May be repeated."
            " Default: all, and auto over tolerances.",
        ),
    ] = None,
    ours: Annotated[str, typer.Option(metavar="NAME", help="The preset that the bars are about.")] = "auto",
    peers: Annotated[bool, typer.Option(help="Run other libraries too, over their settings.")] = True,
    oracle: Annotated[bool, typer.Option(help="Search the best schedules too.")] = True,
    thin: Annotated[
        int, typer.Option(metavar="N", help="Every N-th setting of each peer and control only.", min=1)
    ] = 1,
    jobs: Annotated[
        int,
        typer.Option(metavar="N", help="Processes that share the samples, one thread each (CPU only).", min=1),
    ] = 1,
    device: Device = None,
    dtype: Dtype = None,
    json: JsonOption = None,
) -> None:
    """Caches against the plain run, fewer steps, the oracle and the peers; and whether the bars are met."""
    output = Output("bench cache", json)
    with output.open():
        from hasten.pipelines.bench.bars import bars
        from hasten.pipelines.bench.cache import all_presets, bench_cache, preset
        from hasten.pipelines.bench.peers import sweep
        from hasten.pipelines.bench.shots import Sample
        from hasten.pipelines.generate import makes_video

        chosen = dict(preset(text) for text in presets or all_presets())
        if jobs > 1:
            import torch

            torch.set_num_threads(1)  # before anything runs: forks beside other threads hang
        pipe, call = _bundled("cache", model, device, dtype)
        texts = own_prompts(makes_video(pipe))[:prompts]
        samples = [Sample(text, seed) for seed in range(seeds) for text in texts]
        bench = bench_cache(
            pipe, call, samples, chosen, model=model, peers=sweep(pipe, call, thin) if peers else [],
            oracle_of=ours if oracle else "", thin=thin, jobs=jobs, tell=output.note,
        )  # fmt: skip
        verdicts = bars(bench.rows, ours, bench.outcomes)
        output.table(bench.rows)
        output.say("")
        output.table(
            [{"bar": bar.bar, "met": bar.verdict, "detail": bar.detail} for bar in verdicts],
            {"bar": f"bar, for {ours}", "met": "met", "detail": "numbers"},
        )
        if json not in (None, "-"):
            assert json is not None
            curve = Path(json).with_suffix(".svg")
            atomic_write(curve, _drawn(model, bench.rows))
            output.say(f"The curves are drawn in {curve}.")
        output.finish(
            bench.rows,
            prompts=texts,
            seeds=list(range(seeds)),
            call=call,
            samples=[[sample.prompt, sample.seed] for sample in samples],
            bars=[bar.to_dict() for bar in verdicts],
            outcomes=bench.outcomes,
        )


def _bundled(command: str, model: str, device: str | None, dtype: str | None) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and the call that belongs to it. Raises `UsageError` where none does."""
    from hasten.pipelines.loading import open_pipeline
    from hasten.pipelines.tiny_models import call_defaults

    pipe = open_pipeline(model, device=device, dtype=dtype, quiet=True)
    call = call_defaults(pipe)
    if "num_inference_steps" not in call:
        raise UsageError(f"hasten bench {command} needs a bundled model, got {model}. Use hasten compare for others.")
    return pipe, call


def _drawn(model: str, rows: list[dict[str, Any]]) -> str:
    """Speed-up against PSNR: our presets as one thick line each, then peers and controls."""
    from hasten.pipelines.bench.bars import curves
    from hasten.report_curve import draw_curves

    drawn = [row for row in rows if row.get("control") != "other_seed" and row["recipe"] != "plain"]
    found = {name: [(p.speedup, p.psnr) for p in curve] for name, curve in curves(drawn).items()}
    mine = list(curves(row for row in drawn if not row.get("control")))
    return draw_curves(f"{model}: speed-up against similarity to the plain run", found, mine)


def own_prompts(video: bool) -> list[str]:
    """Sixteen prompts over all digits, directions and speeds. Tuning must use others."""
    from hasten.distill.data.moving_digits import clip_prompt, image_prompt

    digits: list[Any] = [(3 * i) % 10 for i in range(16)]
    if video:
        return [clip_prompt(digit, i % 4, (i // 4) % 2) for i, digit in enumerate(digits)]
    return [image_prompt(digit, None if i < 10 else i % 4) for i, digit in enumerate(digits)]
