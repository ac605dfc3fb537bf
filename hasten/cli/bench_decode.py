"""`hasten bench decode`: drafts, caches and shared prefixes on a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.options import Device, Dtype
from hasten.cli.output import JsonOption, Output
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.bench.decode import Bench, Cell

COLUMNS = {
    "workload": "on", "batch": "batch", "mode": "mode", "recipe": "recipe", "drafts_when": "drafts", "control": "control",
    "tokens_per_forward": "tokens/forward", "drafts": "drafts/forward", "speedup_processor": "speed-up, processor",
    "speedup": "wall", "exact_match": "same text", "note": "note",
}  # fmt: skip
CACHES = {
    "recipe": "cache", "budget": "budget", "bits_per_token": "bits/token", "kl": "KL", "agreement": "same first choice",
    "letters": "letters of lists", "needles": "needles", "bytes_share": "of the bytes", "bytes_held": "held",
}  # fmt: skip
SHARED = {
    "batch": "rows", "prefix": "prefix", "suffix": "suffix", "heads": "heads", "dim": "dim", "seconds_separate": "each for itself",
    "seconds_shared": "shared", "speedup": "speed-up", "largest_difference": "largest difference",
}  # fmt: skip


class Part(StrEnum):
    """What is measured."""

    drafts = "drafts"
    caches = "caches"
    shared = "shared"


class Mode(StrEnum):
    """How tokens are chosen."""

    greedy = "greedy"
    sampled = "sampled"


def decode(
    model: Annotated[str, typer.Option(metavar="MODEL", help="A bundled causal model, or a folder with one.")] = "tiny-lm",
    draft: Annotated[str, typer.Option(metavar="MODEL", help="The assistant of transformers' assisted decoding; none to leave it out.")] = "tiny-draft",
    recipe: Annotated[list[str] | None, typer.Option(metavar="NAME", help="May be repeated. Default: all lossless ones that draft.")] = None,
    workload: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="code, prose, repetitive, noise. May be repeated. Default: all.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Your own instead, one a line.")] = None,
    batch: Annotated[list[int] | None, typer.Option(metavar="N", help="Texts at once; may be repeated. Default: 1, 4, 16.", min=1)] = None,
    mode: Annotated[list[Mode] | None, typer.Option(help="May be repeated. Default: both.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="What to measure; may be repeated. Default: all.")] = None,
    count: Annotated[int, typer.Option(metavar="N", help="Prompts of each workload.", min=1)] = 16,
    new: Annotated[int, typer.Option(metavar="N", help="Tokens to write.", min=2)] = 64,
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed runs of each row.", min=1)] = 3,
    peers: Annotated[bool, typer.Option(help="Run transformers' own drafters, too.")] = True,
    quick: Annotated[bool, typer.Option(help="A few short texts, two recipes.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    json: JsonOption = None,
) -> None:
    """Drafts, caches and shared prefixes of a causal language model: tokens per forward, time, and what they change."""
    output = Output("bench decode", json)
    with output.open():
        from hasten.pipelines.bench.decode import Bench
        from hasten.pipelines.bench.decode_bars import bars
        from hasten.pipelines.loading import silence
        from hasten.pipelines.recipes import recipe as find_recipe
        from hasten.pipelines.text_models.loading import open_text

        silence()
        for name in recipe or []:
            find_recipe(name)  # a misspelt one is said before anything is measured
        parts = part or list(Part)
        opened, tokenizer = open_text(model, None, device, dtype)
        bench = Bench(opened, tokenizer, model, 12 if quick else new, 1 if quick else repeats)
        rows: list[dict[str, Any]] = []
        if Part.drafts in parts:
            sizes = batch or ([1, 2] if quick else [1, 4, 16])
            cells = _cells(tokenizer, workload, prompts, min(count, 2) if quick else count, sizes, mode or list(Mode))
            rows += _drafts(bench, cells, recipe, draft if peers else "none", quick, output)
            output.table(rows, COLUMNS)
        if Part.caches in parts:
            rows += _caches(bench, quick, output)
        if Part.shared in parts:
            rows += _shared(bench, quick, output)
        clock = "speedup" if opened.device.type == "cuda" else "speedup_processor"
        verdicts = [bar.to_dict() | {"verdict": bar.verdict} for bar in bars(rows, clock)]
        output.say("")
        output.table(verdicts, {"bar": "bar", "verdict": "met", "detail": "numbers"})
        output.finish(rows, bars=verdicts, count=count, new=bench.new, repeats=bench.repeats, temperature=bench.temperature, top_k=bench.top_k)


def _cells(
    tokenizer: Any, names: Sequence[str] | None, file: Path | None, count: int, sizes: Sequence[int], modes: Sequence[Mode]
) -> list[Cell]:
    from hasten.cli.prompts import collect
    from hasten.pipelines.bench.decode import Cell
    from hasten.pipelines.bench.decode_texts import WORKLOADS, of_files

    if file is not None:
        works = [of_files(tokenizer, [item.text for item in collect([], file, 0)])]
    else:
        for name in names or ():
            if name not in WORKLOADS:
                raise UsageError(f"There is no workload {name!r}; allowed: {', '.join(WORKLOADS)}.")
        works = [WORKLOADS[name](tokenizer, count) for name in names or WORKLOADS]
    return [Cell(work, size, mode is Mode.sampled) for work in works for size in sizes for mode in modes]


def _drafts(bench: Bench, cells: list[Cell], names: list[str] | None, draft: str, quick: bool, output: Output) -> list[dict[str, Any]]:
    from hasten.pipelines.bench.decode import OTHER_SIZES, every, table
    from hasten.pipelines.bench.decode_peers import peers
    from hasten.pipelines.text_models.loading import open_text

    found = []
    if draft != "none":
        kind = str(bench.model.dtype).removeprefix("torch.")
        found = peers(open_text(draft, None, str(bench.model.device), kind)[0])
    chosen = names or (every()[:1] if quick else [*every(), *OTHER_SIZES])
    rows = table(bench, cells, chosen, found[:: len(found) - 1] if quick and found else found, output.note)
    return [{"part": "drafts"} | row for row in rows]


def _caches(bench: Bench, quick: bool, output: Output) -> list[dict[str, Any]]:
    from hasten.pipelines.decode_kv import bench as kv

    small: dict[str, Any] = {"count": 1, "names": ("streaming-llm",), "shares": (0.25,), "packing": ("int8-kv",)} if quick else {}
    size: dict[str, Any] = {"given": 96 if quick else 192, "new": 8 if quick else 32}  # within the 256 tokens of the longest texts that tiny-lm was trained on
    found = kv.table(bench.model, bench.tokenizer, told=lambda name: output.note(f"cache: {name}"), **size, **small)
    rows = [
        {"part": "caches", "model": bench.name, "recipe": row["policy"]} | ({"control": "full"} if row["policy"] == kv.FULL else {}) | row
        for row in found
    ]
    output.say("")
    output.table(rows, CACHES)
    return rows


def _shared(bench: Bench, quick: bool, output: Output) -> list[dict[str, Any]]:
    from hasten.pipelines.decode_kv.bench_shared import attention

    output.note("shared prefix")
    small: dict[str, Any] = {"batch": 4, "prefix": 256, "rounds": 2} if quick else {}
    found = attention(device=str(bench.model.device), **small)
    rows = [{"part": "shared", "model": "synthetic", "recipe": "hydragen"} | found]
    output.say("")
    output.table(rows, SHARED)
    return rows
