"""`hasten bench decode`: drafts, caches and shared prefixes on a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.options import Device, Dtype
from hasten.cli.output import JsonOption, Output, hardware, versions
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.bench.decode import Bench, Cell
    from hasten.pipelines.bench.decode_peers import Peer
    from hasten.pipelines.bench.decode_ways import Way

COLUMNS = {
    "workload": "on", "batch": "batch", "mode": "mode", "recipe": "recipe", "student": "student", "drafts_when": "drafts",
    "control": "control",
    "tokens_per_forward": "tokens/forward", "drafts": "drafts/forward", "speedup_processor": "speed-up, processor",
    "speedup": "wall", "exact_match": "same text", "n": "texts", "note": "note",
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
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE|FOLDER", help="A recipe, its file, or the folder of a training (medusa, mtp, ppd, first). May be repeated."
            " Default: all lossless ones that draft and need no training.",
        ),
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="code, prose, repetitive, noise. May be repeated. Default: all.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Your own instead, one a line.")] = None,
    batch: Annotated[list[int] | None, typer.Option(metavar="N", help="Texts at once; may be repeated. Default: 1, 4, 16.", min=1)] = None,
    mode: Annotated[list[Mode] | None, typer.Option(help="May be repeated. Default: both.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="What to measure; may be repeated. Default: all.")] = None,
    count: Annotated[int, typer.Option(metavar="N", help="Prompts of each workload.", min=1)] = 16,
    new: Annotated[int, typer.Option(metavar="N", help="Tokens to write.", min=2)] = 64,
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed runs of each row; 0 only counts tokens, in every round.", min=0)] = 3,
    peers: Annotated[bool, typer.Option(help="Run transformers' own drafters, too.")] = True,
    quick: Annotated[bool, typer.Option(help="A few short texts, two recipes.")] = False,
    onto: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What --json of an earlier run wrote, or a new file: its other rows stay. It is written unless --json names another."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: JsonOption = None,
) -> None:
    """Drafts, caches and shared prefixes of a causal language model: tokens per forward, time, and what they change."""
    output = Output("bench decode", json if json or onto is None else str(onto))
    with output.open():
        from hasten.pipelines.bench.decode import Bench
        from hasten.pipelines.bench.decode_file import earlier
        from hasten.pipelines.bench.decode_ways import OTHER_SIZES, every, way
        from hasten.pipelines.loading import silence
        from hasten.pipelines.text_models.loading import open_text

        silence()
        chosen = [way(name) for name in recipe or ([] if quick else OTHER_SIZES)]  # a misspelt one is said before anything is measured
        ways = chosen if recipe else every()[:1] if quick else [*every(), *chosen]
        parts = part or list(Part)
        opened, tokenizer = open_text(model, None, device, dtype)
        bench = Bench(opened, tokenizer, model, 12 if quick else new, min(repeats, 1) if quick else repeats)
        old = earlier(onto, bench, versions(), hardware()) if onto is not None and onto.exists() else []
        result = Result(bench, output, count, old)
        if Part.drafts in parts:
            sizes = batch or ([1, 2] if quick else [1, 4, 16])
            cells = _cells(tokenizer, workload, prompts, min(count, 2) if quick else count, sizes, mode or list(Mode))
            _drafts(result, cells, ways, _peers(bench, draft if peers else "none", quick))
        if Part.caches in parts:
            _caches(result, quick)
        if Part.shared in parts:
            _shared(result, quick)
        result.finish()


@dataclass(slots=True)
class Result:
    """Rows of this run, and those of earlier ones that stay. Every row is on disk when it is measured."""

    bench: Bench
    output: Output
    count: int
    old: list[dict[str, Any]]
    new: list[dict[str, Any]] = field(default_factory=list)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Further rows."""
        self.new += rows
        found, facts = self._document()
        self.output.keep(found, **facts)

    def finish(self) -> None:
        """Say which bars are met, over all rows, and write them."""
        found, facts = self._document()
        self.output.say("")
        self.output.table(facts["bars"], {"bar": "bar", "verdict": "met", "detail": "numbers"})
        self.output.finish(found, lines=True, **facts)

    def _document(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        from hasten.pipelines.bench.decode_bars import bars
        from hasten.pipelines.bench.decode_file import together

        rows, bench = together(self.old, self.new), self.bench
        clock = "speedup" if bench.model.device.type == "cuda" else "speedup_processor"
        verdicts = [bar.to_dict() | {"verdict": bar.verdict} for bar in bars(rows, clock)]
        own = {"new": bench.new, "repeats": bench.repeats, "temperature": bench.temperature, "top_k": bench.top_k}
        return rows, {"bars": verdicts, "count": self.count} | own


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


def _peers(bench: Bench, draft: str, quick: bool) -> list[Peer]:
    from hasten.pipelines.bench.decode_peers import peers
    from hasten.pipelines.text_models.loading import open_text

    if draft == "none":
        return []
    kind = str(bench.model.dtype).removeprefix("torch.")
    found = peers(open_text(draft, None, str(bench.model.device), kind)[0])
    return [found[0], found[-1]] if quick else found


def _drafts(result: Result, cells: list[Cell], ways: list[Way], peers: list[Peer]) -> None:
    from hasten.pipelines.bench.decode import measured

    begun = len(result.new)
    for cell in cells:
        left_out = cell.workload.adverse and not result.bench.repeats
        result.output.note(f"{cell}: left out, for these prompts are about time, and --repeats 0 takes none" if left_out else str(cell))
        for row in measured(result.bench, cell, ways, peers):
            result.add([{"part": "drafts"} | row])
    result.output.table(result.new[begun:], COLUMNS)


def _caches(result: Result, quick: bool) -> None:
    from hasten.pipelines.decode_kv import bench as kv

    bench, output = result.bench, result.output
    small: dict[str, Any] = {"count": 1, "names": ("streaming-llm",), "shares": (0.25,), "packing": ("int8-kv",)} if quick else {}
    size: dict[str, Any] = {"given": 96 if quick else 192, "new": 8 if quick else 32}  # within the 256 tokens of the longest texts that tiny-lm was trained on
    found = kv.table(bench.model, bench.tokenizer, told=lambda name: output.note(f"cache: {name}"), **size, **small)
    rows = [
        {"part": "caches", "model": bench.name, "recipe": row["policy"]} | ({"control": "full"} if row["policy"] == kv.FULL else {}) | row
        for row in found
    ]
    result.add(rows)
    output.say("")
    output.table(rows, CACHES)


def _shared(result: Result, quick: bool) -> None:
    from hasten.pipelines.decode_kv.bench_shared import attention

    bench, output = result.bench, result.output
    output.note("shared prefix")
    small: dict[str, Any] = {"batch": 4, "prefix": 256, "rounds": 2} if quick else {}
    found = attention(device=str(bench.model.device), **small)
    rows = [{"part": "shared", "model": "synthetic", "recipe": "hydragen"} | found]
    result.add(rows)
    output.say("")
    output.table(rows, SHARED)
