"""What drafts are worth on a causal language model: the measurements behind `hasten bench decode`.

Every row is one recipe, or one way of transformers, on the same prompts, weights and batches; plain `generate` runs directly
before it, batch by batch, so that both have the same machine. Forwards are counted row by row, the prompt's included: a
batch of four that is written by one more forward has four more. Counting runs are not timed.

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
from hasten.pipelines.decode.drafters_candidates import Candidates
from hasten.pipelines.decode.drafters_small import SmallModel
from hasten.pipelines.decode.session import DecodeSession
from hasten.pipelines.recipes import catalogue
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Drafting, FromFile, Recipe
from hasten.samplers.decode.pace import Goodput, Steady
from hasten.samplers.drafters.copy_input import Copy
from hasten.samplers.drafters.jacobi import Jacobi
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.drafters.mixed import Mixed
from hasten.samplers.drafters.tri_gram import TriGram
from hasten.samplers.drafters.trie import Trie

PLAIN = "plain"
EVERY, PACED = "every round", "goodput"
"""When is drafted: always, for what drafts are worth; or where it pays, for what that saves."""

Tell = Callable[[str], None]


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
    """One model under measurement. new: tokens to write; repeats: timed passes; top_k, temperature: of sampled runs."""

    model: Any
    tokenizer: Any
    name: str = ""
    new: int = 64
    repeats: int = 3
    temperature: float = 0.8
    top_k: int = 40
    seed: int = 0

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
            plain = self._pass(cell, self._plain)
            runs = [self._pass(cell, self._plain) for _ in range(self.repeats)]
            return _facts(plain, runs, runs) | {"tokens_per_forward": 1.0, "drafts": 0.0, "asked": 0.0, "exact_match": 1.0}
        if isinstance(how, Peer):
            return self._of_peer(cell, how)
        with hasten.accelerate(self.model, how) as session:
            assert isinstance(session, DecodeSession)
            return self._of_recipe(cell, how, session)

    def _of_recipe(self, cell: Cell, recipe: Recipe, session: DecodeSession) -> dict[str, Any]:
        def ours(**inputs: Any) -> Tensor:
            return self.model.generate(**inputs)  # type: ignore[no-any-return]

        base, plains, runs = self._beside(cell, ours)
        rounds = session.trace.rounds
        read, rows = sum(each.nodes * each.rows for each in rounds), sum(each.rows for each in rounds)
        whole = sum(each.seconds for each in rounds)
        prompts = len(cell.workload.prompts) * (self.repeats + 1)
        report = session.report()
        drafter = recipe.draft
        return _facts(base, plains, runs) | {
            "tokens_per_forward": (report.written + prompts) / (rows + prompts), "drafts": read / max(rows, 1),
            "allowed": getattr(drafter, "nodes", None), "asked": statistics.median(each.asked for each in rounds) if rounds else 0.0,
            "exact_match": None if cell.sampled else _same(base, runs[0]), "exactness": report.exactness,
            "draft_share": sum(each.draft for each in rounds) / whole if whole else 0.0, "drafts_when": _when(recipe),
            "family": _family(drafter), "note": "; ".join(session.trace.notes) or None,
        }  # fmt: skip

    def _of_peer(self, cell: Cell, peer: Peer) -> dict[str, Any]:
        if cell.batch > 1:
            raise NotImplementedError("transformers refuses drafts for more than one row")
        call = peer.call(self.model, self._plain)
        with peer.counting(self.model) as count:
            self._pass(cell, call)
        base, plains, runs = self._beside(cell, call)
        return _facts(base, plains, runs) | {
            "tokens_per_forward": runs[0].tokens / max(count.forwards, 1), "drafts": count.drafts / max(count.forwards, 1),
            "allowed": peer.allowed, "exact_match": None if cell.sampled else _same(base, runs[0]), "drafts_when": EVERY,
            "family": peer.family,
        }  # fmt: skip

    def _beside(self, cell: Cell, call: Callable[..., Tensor]) -> tuple[Run, list[Run], list[Run]]:
        """(a first plain pass, timed plain passes, timed passes of `call`); the first of each warms up."""
        base, _ = self._pass(cell, self._plain), self._pass(cell, call)
        plains, runs = [], []
        for _ in range(self.repeats):
            plain, run = Run(), Run()
            for number, inputs in enumerate(cell.workload.batches(cell.batch, self._pad)):
                self._batch(cell, self._plain, inputs, number, plain)
                self._batch(cell, call, inputs, number, run)
            plains.append(plain)
            runs.append(run)
        return base, plains, runs

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


def _facts(base: Run, plains: Sequence[Run], runs: Sequence[Run]) -> dict[str, Any]:
    """Times per written token, beside those of plain `generate`: batch by batch, the median."""

    def ratio(which: str) -> float:
        """Plain over ours, per token; a sampled text may be longer than the plain one."""
        found: list[float] = [
            (x / plain.tokens) / (y / run.tokens)
            for plain, run in zip(plains, runs, strict=True)
            for x, y in zip(getattr(plain, which), getattr(run, which), strict=True)
        ]
        return statistics.median(found)

    return {
        "n": len(base.texts), "tokens": runs[0].tokens, "seconds": statistics.median(sum(run.seconds) for run in runs),
        "processor_seconds": statistics.median(sum(run.processor) for run in runs), "speedup": ratio("seconds"),
        "speedup_processor": ratio("processor"),
    }  # fmt: skip


def _same(one: Run, other: Run) -> float:
    """Share of prompts with the same text, token for token."""
    return statistics.fmean(a == b for a, b in zip(one.texts, other.texts, strict=True))


def _when(recipe: Recipe) -> str:
    return PACED if recipe.pace is None else EVERY if isinstance(recipe.pace, Steady) else recipe.pace.kind


def _family(drafter: Any) -> str:
    """What a draft costs: "text" looks into texts alone, "model" runs a smaller network; the "dear" ones run the model itself, in
    part or whole, or a network as large, and transformers has nothing to compare them with."""
    if isinstance(drafter, Mixed):
        return max((_family(drafter.first), _family(drafter.second)), key=("text", "model", "dear").index)
    if isinstance(drafter, Candidates):
        return "text" if drafter.which == "prompt-lookup" else "model"
    return "text" if isinstance(drafter, TEXT_DRAFTERS) else "model" if isinstance(drafter, SmallModel) else "dear"


TEXT_DRAFTERS = (LookUp, Trie, TriGram, Copy, Jacobi)
"""Drafters that run no network: their drafts cost the reading of nodes, and nothing else."""

OTHER_SIZES = ("look-up:nodes=16", "speculative:nodes=8", "dyspec:nodes=8,depth=8")
"""Measured besides, for as many drafts as transformers' settings may make."""


# --- what is measured -----------------------------------------------------------------------------


def both(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe with drafts in every round, and with goodput, which drafts where it pays."""
    return {EVERY: recipe.model_copy(update={"pace": Steady()}), PACED: recipe.model_copy(update={"pace": Goodput()})}


def every() -> list[str]:
    """All lossless recipes that draft, but those that read a file which a training has to write first."""
    return [
        entry.name for entry in catalogue()
        if entry.recipe.draft is not None and getattr(entry.recipe.verify, "lossless", True) and not _trained(entry.recipe.draft)
    ]


def _trained(draft: Drafting) -> bool:
    return isinstance(draft, FromFile) or isinstance(getattr(draft, "skip", None), FromFile)


def table(
    bench: Bench, cells: Sequence[Cell], names: Sequence[str], peers: Sequence[Peer], tell: Tell = lambda _: None
) -> list[dict[str, Any]]:
    """Rows for plain decoding, each peer, and each recipe in both paces, cell by cell."""
    recipes = [(name, when, each) for name in names for when, each in both(find_recipe(name)).items()]
    rows = []
    for cell in cells:
        tell(str(cell))
        rows.append(bench.row(cell, PLAIN, None))
        for peer in peers:
            rows.append(bench.row(cell, peer.name, peer, f"peer:transformers {peer.what}"))
        for name, when, each in recipes:
            if not (cell.workload.adverse and when == EVERY):  # the adverse ones ask whether pacing keeps plain's speed
                rows.append({"drafts_when": when} | bench.row(cell, name, each))
    return rows
