"""`hasten bench dllm`: ways of decoding and caches on a text diffusion model."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from hasten.cli.options import Device, Dtype
from hasten.cli.output import JsonOption, Output

COLUMNS = {
    "workload": "on",
    "recipe": "recipe",
    "control": "control",
    "nfe": "NFE",
    "tokens_per_forward": "tokens/NFE",
    "token_layers": "token-layers",
    "of_sequential": "of sequential",
    "speedup": "speed-up",
    "exact_match": "exact",
    "agreement": "agreement",
    "position_agreement": "of tokens",
    "bytes_held": "held",
    "note": "note",
}
"""Row key -> heading; see docs/dllm-bench.md for what they mean."""


def dllm(
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A bundled text model, or a folder with one.")
    ] = "tiny-dllm",
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="May be repeated; names join with +. Default: all, each with each cache."),
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="lists, code. May be repeated. Default: both.")
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", help="Questions of each list task, and pieces of code.", min=1)] = 32,
    batch: Annotated[int, typer.Option(metavar="N", help="Texts at once.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(metavar="N", help="Runs of each recipe, for the median of the time.", min=1)] = 1,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the questions; 77 are those of the docs.")] = 77,
    quick: Annotated[bool, typer.Option(help="A few recipes on a few questions.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    json: JsonOption = None,
) -> None:
    """Ways of decoding and caches for text diffusion: work, time and whether the answers stay right."""
    output = Output("bench dllm", json)
    with output.open():
        from hasten.errors import UsageError
        from hasten.pipelines.bench import dllm as bench
        from hasten.pipelines.bench.dllm_bars import bars
        from hasten.pipelines.recipes import recipe as find_recipe
        from hasten.pipelines.text_models.families import choose
        from hasten.pipelines.text_models.loading import open_text

        works: dict[str, Any] = {"lists": bench.lists, "code": bench.code}
        wanted = list(workload or works)
        for name in wanted:
            if name not in works:
                raise UsageError(f"There is no workload {name!r}; allowed: {', '.join(works)}.")
        for name in recipe or []:
            find_recipe(name)  # a misspelt one is said before anything is measured
        network, tokenizer = open_text(model, None, device, dtype)
        measured = bench.Bench(choose(network, tokenizer), tokenizer, batch, repeats)
        names = recipe or (bench.few() if quick else bench.every(measured.host.facts))
        rows: list[dict[str, Any]] = []
        verdicts: list[dict[str, Any]] = []
        for name in wanted:
            work = works[name](tokenizer, min(count, 4) if quick else count, seed=seed)
            found = bench.table(measured, work, names, model, partial(_tell, output, name))
            rows += found
            verdicts += [
                {"workload": name} | bar.to_dict() | {"verdict": bar.verdict}
                for bar in bars(found, bench.OURS, bench.lossless(names, measured.host.facts))
            ]
        output.table(rows, COLUMNS)
        output.say("")
        output.table(verdicts, {"workload": "on", "bar": "bar", "verdict": "met", "detail": "numbers"})
        output.finish(rows, bars=verdicts, batch=batch, count=count, seed=seed, repeats=repeats)


def _tell(output: Output, workload: str, recipe: str) -> None:
    output.note(f"{workload}: {recipe}")
