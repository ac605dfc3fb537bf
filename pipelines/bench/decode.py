"""What drafts are worth on a causal language model: the measurements behind `hasten bench decode`.

Every row is one recipe, or one way of transformers, on the same prompts, weights and batches; plain `generate` runs directly
before it, batch by batch, so that both have the same machine. Forwards are counted row by row, the prompt's included: a
batch of four that is written by one more forward has four more. Counting runs are not timed, and may be all there are.

Times are of the processor (what this process used) and of the wall; ratios are medians over batches and repeats.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten.errors import HastenError
from hasten.pipelines.bench.decode_peers import Peer
from hasten.pipelines.bench.decode_texts import Workload
from hasten.pipelines.bench.decode_ways import EVERY, PACED, Way, family, when
from hasten.pipelines.decode.session import DecodeSession
from hasten.recipe import Recipe

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Cell:
    """Where rows can be compared: one workload at one batch size, greedy or sampled."""

    workload: Workload
    batch: int
    sampled: bool

    def __str__(self) -> str:
        return f"{self.workload.name}, batch {self.batch}, {'sampled' if self.sampled else 'greedy'}"

    @property
    def keys(self) -> dict[str, Any]:
        """These as keys of a row."""
        mode = "sampled" if self.sampled else "greedy"
        return {"workload": self.workload.name, "batch": self.batch, "mode": mode, "adverse": self.workload.adverse}


@dataclass(slots=True)
class Run:
    """One pass over a cell. texts: new tokens of every prompt. seconds, processor: of each batch."""

    texts: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


@dataclass(slots=True)
class Bench:
    """One model under measurement. new: tokens to write; repeats: timed passes, 0 to count alone; top_k, temperature: of
    sampled runs."""

    model: Any
    tokenizer: Any
    name: str = ""
    new: int = 64
    repeats: int = 3
    temperature: float = 0.8
    top_k: int = 40
    seed: int = 0
    _plain_texts: tuple[Cell, Run] | None = None

    def row(self, cell: Cell, name: str, how: Recipe | Peer | None, control: str = "") -> dict[str, Any]:
        """One row; a recipe or peer that the model or the batch refuses has the reason in `note`, and no numbers."""
        row: dict[str, Any] = {"model": self.name, "recipe": name} | cell.keys
        if control:
            row["control"] = control
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="hasten: ")
                return row | self._measured(cell, how)
        except (HastenError, ValueError, NotImplementedError) as error:
            return row | {"note": " ".join(str(error).split())[:400]}

    # --- one row ----------------------------------------------------------------------------------

    def _measured(self, cell: Cell, how: Recipe | Peer | None) -> dict[str, Any]:
        if how is None:
            base = self._base(cell)
            runs = [self._pass(cell, self._plain) for _ in range(self.repeats)]
            return _facts(base, runs, runs) | {"tokens_per_forward": 1.0, "drafts": 0.0, "asked": 0.0, "exact_match": 1.0}
        if isinstance(how, Peer):
            return self._of_peer(cell, how)
        with hasten.accelerate(self.model, how) as session:
            assert isinstance(session, DecodeSession)
            return self._of_recipe(cell, how, session)

    def _of_recipe(self, cell: Cell, recipe: Recipe, session: DecodeSession) -> dict[str, Any]:
        def ours(**inputs: Any) -> Tensor:
            return self.model.generate(**inputs)  # type: ignore[no-any-return]

        base, first = self._base(cell), self._pass(cell, ours)
        plains, runs = self._timed(cell, ours)
        rounds = session.trace.rounds
        read, rows = sum(each.nodes * each.rows for each in rounds), sum(each.rows for each in rounds)
        prompts = len(cell.workload.prompts) * (self.repeats + 1)
        report = session.report()
        return _facts(first, plains, runs) | {
            "tokens_per_forward": (report.written + prompts) / (rows + prompts), "drafts": read / max(rows, 1),
            "allowed": getattr(recipe.draft, "nodes", None), "asked": statistics.median(each.asked for each in rounds) if rounds else 0.0,
            "exact_match": _same(cell, base, [first, *runs]), "exactness": report.exactness, "drafts_when": when(recipe),
            "family": family(recipe.draft), "note": "; ".join(session.trace.notes) or None,
        }  # fmt: skip

    def _of_peer(self, cell: Cell, peer: Peer) -> dict[str, Any]:
        if cell.batch > 1:
            raise NotImplementedError("transformers refuses drafts for more than one row")
        call = peer.call(self.model, self._plain)
        base = self._base(cell)
        with peer.counting(self.model) as count:
            first = self._pass(cell, call)
        plains, runs = self._timed(cell, call)
        return _facts(first, plains, runs) | {
            "tokens_per_forward": first.tokens / max(count.forwards, 1), "drafts": count.drafts / max(count.forwards, 1),
            "allowed": peer.allowed, "exact_match": _same(cell, base, [first, *runs]), "drafts_when": EVERY, "family": peer.family,
        }  # fmt: skip

    def _base(self, cell: Cell) -> Run:
        """Plain decoding's texts, written once for all rows of a cell; this warms up, too."""
        if self._plain_texts is None or self._plain_texts[0] is not cell:
            self._plain_texts = cell, self._pass(cell, self._plain)
        return self._plain_texts[1]

    def _timed(self, cell: Cell, call: Callable[..., Tensor]) -> tuple[list[Run], list[Run]]:
        """(plain passes, passes of `call`), batch by batch one after the other."""
        plains, runs = [], []
        for _ in range(self.repeats):
            plain, run = Run(), Run()
            for number, inputs in enumerate(cell.workload.batches(cell.batch, self._pad)):
                self._batch(cell, self._plain, inputs, number, plain)
                self._batch(cell, call, inputs, number, run)
            plains.append(plain)
            runs.append(run)
        return plains, runs

    # --- running ----------------------------------------------------------------------------------

    def _pass(self, cell: Cell, call: Callable[..., Tensor]) -> Run:
        run = Run()
        for number, inputs in enumerate(cell.workload.batches(cell.batch, self._pad)):
            self._batch(cell, call, inputs, number, run)
        return run

    def _batch(self, cell: Cell, call: Callable[..., Tensor], inputs: dict[str, Tensor], number: int, run: Run) -> None:
        more: dict[str, Any] = {"do_sample": False}
        if cell.sampled:
            more = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k}
        device = self.model.device
        placed = {name: value.to(device) for name, value in inputs.items()}
        torch.manual_seed(self.seed + number)
        with torch.no_grad(), _clock(run, device):
            found = call(**placed, **more, max_new_tokens=self.new, pad_token_id=self._pad)
        ends = _ends(self.model)
        for row in found[:, placed["input_ids"].shape[1] :].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            run.texts.append(row[: stop + 1])

    def _plain(self, **inputs: Any) -> Tensor:
        """transformers' own, also while a session is open on the model."""
        return type(self.model).generate(self.model, **inputs)  # type: ignore[no-any-return]

    @property
    def _pad(self) -> int:
        own = self.model.generation_config.pad_token_id
        return int(own if own is not None else min(_ends(self.model), default=0))


@contextmanager
def _clock(run: Run, device: torch.device) -> Iterator[None]:
    began = time.perf_counter(), time.process_time()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    run.seconds.append(time.perf_counter() - began[0])
    run.processor.append(time.process_time() - began[1])


def _ends(model: Any) -> set[int]:
    """Ids that end a text."""
    found = model.generation_config.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _facts(first: Run, plains: Sequence[Run], runs: Sequence[Run]) -> dict[str, Any]:
    """How much was written, and times per written token beside those of plain `generate`: batch by batch, the median."""

    def ratio(which: str) -> float:
        """Plain over ours, per token; a sampled text may be longer than the plain one."""
        found: list[float] = [
            (x / plain.tokens) / (y / run.tokens)
            for plain, run in zip(plains, runs, strict=True)
            for x, y in zip(getattr(plain, which), getattr(run, which), strict=True)
        ]
        return statistics.median(found)

    counted = {"n": len(first.texts), "repeats": len(runs), "tokens": first.tokens}
    if not runs:
        return counted
    return counted | {
        "seconds": statistics.median(sum(run.seconds) for run in runs),
        "processor_seconds": statistics.median(sum(run.processor) for run in runs), "speedup": ratio("seconds"),
        "speedup_processor": ratio("processor"),
    }  # fmt: skip


def _same(cell: Cell, base: Run, runs: Sequence[Run]) -> float | None:
    """Share of prompts with plain decoding's text, token for token, in the pass that has the fewest; None where tokens are drawn."""
    if cell.sampled:
        return None
    return min(statistics.fmean(a == b for a, b in zip(base.texts, run.texts, strict=True)) for run in runs)


# --- one cell -------------------------------------------------------------------------------------


def measured(bench: Bench, cell: Cell, ways: Sequence[Way], peers: Sequence[Peer]) -> Iterator[dict[str, Any]]:
    """Rows of one cell, as they come: plain decoding, each peer, and each recipe in both paces. Where nothing is timed, goodput
    and adverse prompts, which are about time alone, have no rows."""
    if cell.workload.adverse and not bench.repeats:
        return
    yield bench.row(cell, PLAIN, None)
    for peer in peers:
        yield bench.row(cell, peer.name, peer, f"peer:transformers {peer.what}")
    for way in ways:
        for pace, recipe in way.paces().items():
            if bench.repeats if pace == PACED else not cell.workload.adverse:  # which ask whether goodput keeps plain's speed
                yield {"drafts_when": pace} | bench.row(cell, way.name, recipe) | way.keys
