"""One call of `generate`: everything that can be wrong is found first, then the loop runs, then it is accounted for.

Shapes: B texts, L slots.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.caching.kv import Recompute, TokenKV
from hasten.canvas import Canvas, Row
from hasten.errors import LimitError, RefusedError, UsageError
from hasten.limits import Limits
from hasten.noise import seeds
from hasten.pipelines.host import hardware
from hasten.pipelines.text.arguments import PLAIN, Decoding
from hasten.pipelines.text.filters import own_filters
from hasten.pipelines.text.loop import Evaluate, OnStep, TextLoop
from hasten.pipelines.text.output import Sheet, TextOutput
from hasten.pipelines.text.prompts import Prompts
from hasten.pipelines.text.shaping import Guided, HoldEnd
from hasten.pipelines.text.stream import Criterion, Reader
from hasten.pipelines.text_models.guide import Guide
from hasten.pipelines.text_models.host import TextHost
from hasten.pipelines.text_models.repeats import LEAST, repeats, sentence
from hasten.recipe import Recipe
from hasten.report_diffusion import Generation, TextDiffusionReport
from hasten.samplers.commit import Unmask
from hasten.samplers.revise import RevisePolicy
from hasten.samplers.scores import Scores
from hasten.samplers.text_blocks import AtDelimiter, InBlocks
from hasten.samplers.verify import Verifier

AXES: dict[str, type] = {
    "kv": TokenKV, "commit": Unmask, "revise": RevisePolicy, "blocks": InBlocks, "verify": Verifier,
}  # fmt: skip
"""Axes that act on texts written in any order, and what stands on them."""


@dataclass(slots=True)
class Job:
    """What is to be generated. recipe: with the numbers of the call in it. notes: for the report. history: keep every step."""

    host: TextHost
    tokenizer: Any
    prompts: Prompts
    new: Sequence[int]
    recipe: Recipe
    numbers: Decoding
    limits: Limits
    generator: Any = None
    guide: Guide | None = None
    streamers: Sequence[Any] = ()
    criteria: Sequence[Criterion] = ()
    on_step: OnStep | None = None
    history: bool = False
    words: bool = True
    notes: list[str] = field(default_factory=list)

    def run(self) -> TextOutput:
        """Generate. The model is as it was afterwards, whatever happens."""
        self._ask_about_written()
        began, guided = time.perf_counter(), self.guide.tokens if self.guide is not None else 0
        canvas = Canvas.of(self.prompts.ids, self.new, self.host.facts, self.host.device)
        loop, evaluate = self._loop(canvas)
        reader = None
        if self.streamers or self.criteria:
            reader = Reader(self.prompts.ids, self.streamers, self.criteria, self.recipe.revise is not None)
        kept: list[Tensor] = []
        loop.run(self._watched(loop, evaluate, kept), reader)
        if reader is not None:
            reader.close()
        rows = canvas.look()
        held = loop.store.bytes + (evaluate.store.bytes if isinstance(evaluate, Guided) else 0)
        asked = self.guide.tokens - guided if self.guide is not None else 0
        cost = self._cost(loop, rows, time.perf_counter() - began, asked)
        return self._output(canvas, rows, kept, cost, held)

    def _ask_about_written(self) -> None:
        """Leave out a reviser that goes by what the model says of written tokens, where that means nothing."""
        revise, host = self.recipe.revise, self.host
        if not isinstance(revise, RevisePolicy) or revise.shadows or not revise.written:
            return
        if host.repeats is None:
            host.repeats = repeats(host, self.prompts.ids)
        if host.repeats is not None and host.repeats < LEAST:
            self.recipe = self.recipe.model_copy(update={"revise": None})
            self.notes.append(sentence(host.repeats, revise.kind))

    def _loop(self, canvas: Canvas) -> tuple[TextLoop, Evaluate]:
        facts, numbers = self.host.facts, self.numbers
        base: Evaluate = self.host.run
        if numbers.cfg_scale:
            if isinstance(self.recipe.kv, TokenKV) and self.recipe.kv.layered:
                raise RefusedError(
                    f"cfg_scale evaluates each text twice, and the cache {self.recipe.kv.kind!r} decides layer by layer about one"
                    " evaluation. Take another cache, or leave cfg_scale out."
                )
            assert facts.mask_id is not None
            base = Guided(base, canvas, facts.mask_id, numbers.cfg_scale)
        shaped = base
        if numbers.eos_penalty or numbers.min_new_tokens:
            shaped = HoldEnd(base, canvas, facts.eos_ids, numbers.eos_penalty, numbers.min_new_tokens)
        seed = seeds(self.generator, len(canvas.ids)).to(canvas.ids.device)
        return TextLoop(self.host, self.recipe, canvas, numbers.draw(seed), self.guide, shaped), base

    def _watched(self, loop: TextLoop, evaluate: Evaluate, kept: list[Tensor]) -> OnStep:
        """What happens after each step. Nothing of it waits for the device."""
        cap = self.limits.max_cache_bytes

        def after(number: int, canvas: Canvas, scores: Scores, rows: list[Row]) -> bool:
            store = evaluate.store if isinstance(evaluate, Guided) else loop.store
            if cap is not None and store.bytes > cap:
                raise LimitError(
                    f"The cache holds {store.bytes:,} bytes; at most {cap:,} are allowed (max_cache_bytes). Generate fewer or"
                    " shorter texts at once, or take a recipe without a cache."
                )
            if self.history:
                kept.append(canvas.ids.clone())
            return bool(self.on_step(number, canvas, scores, rows)) if self.on_step is not None else False

        return after

    # --- the account ------------------------------------------------------------------------------

    def _cost(self, loop: TextLoop, rows: list[Row], seconds: float, guide: int) -> Generation:
        branches = 2 if self.numbers.cfg_scale else 1
        layers = self.host.facts.layers * branches
        written = tuple(row.end - row.start - row.masks for row in rows)
        anew = [0.0] * len(rows)
        for before in loop.tally.rows:
            for number, row in enumerate(before):
                anew[number] += row.end * layers if row.open else 0
        whole = [length + more for length, more in zip(self.prompts.lengths, self.new, strict=True)]
        return Generation(
            steps=len(loop.tally.rows), prompt=tuple(self.prompts.lengths), written=written,
            evaluations=tuple(branches * count for count in loop.tally.evaluations.tolist()),
            computed=tuple(branches * count for count in loop.tally.layers.tolist()), anew=tuple(anew),
            sequential=tuple(float(count * slots * layers) for count, slots in zip(written, whole, strict=True)),
            seconds=seconds, guide=guide, stopped=any(row.open for row in rows),
        )  # fmt: skip

    def _report(self, cost: Generation, held: int) -> TextDiffusionReport:
        kv = self.recipe.kv
        assert kv is None or isinstance(kv, TokenKV)
        return TextDiffusionReport(
            [cost], None if self.recipe.axes == PLAIN.axes else self.recipe, type(self.host.model).__name__, self.host.family,
            kv.kind if kv is not None else Recompute.kind, kv is None or kv.exact, held, list(self.notes),
            hardware(str(self.host.device)),
        )  # fmt: skip

    def _output(
        self, canvas: Canvas, rows: list[Row], kept: list[Tensor], cost: Generation, held: int
    ) -> TextOutput:  # fmt: skip
        sheet = Sheet.of(rows, self.prompts.width, canvas, self.host.facts.pad_id)
        sequences = sheet.sequences(canvas.ids)
        lengths = torch.tensor(cost.written)
        nfe = torch.tensor(cost.evaluations)
        return TextOutput(
            sequences, self._texts(sequences, rows, sheet.width), lengths, nfe, lengths / nfe.clamp(min=1),
            sheet.lay(canvas.committed.long(), -1)[:, sheet.width :], torch.tensor(cost.computed, dtype=torch.float64),
            cost.stopped, tuple(sheet.sequences(ids) for ids in kept), self._report(cost, held),
        )  # fmt: skip

    def _texts(self, sequences: Tensor, rows: list[Row], width: int) -> list[str] | None:
        if self.tokenizer is None or not self.words:
            return None
        written = [line[width : width + row.end - row.start] for line, row in zip(sequences.tolist(), rows, strict=True)]
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]


def fitting(recipe: Recipe, host: TextHost, tokenizer: Any = None) -> Recipe:
    """The recipe, if it can act on this model; delimiters in it get their ids, and trained filters that are not named are
    the model's own. Raises `UsageError` or `RefusedError`."""
    acts_on_texts(recipe)
    recipe = own_filters(recipe, host.model)
    if isinstance(recipe.kv, TokenKV) and not isinstance(recipe.kv, Recompute) and not host.caches:
        raise RefusedError(
            f"Recipe {recipe.name!r} keeps keys and values ({recipe.kv.kind}), and those of {type(host.model).__name__} change"
            " with every step, or cannot be followed. Take a recipe without a cache."
        )
    if getattr(recipe.revise, "shadows", False) and not host.caches:
        raise RefusedError(
            f"Recipe {recipe.name!r} revises by copies of slots beside the text, and {type(host.model).__name__} can only be"
            " evaluated on whole texts. Take a recipe without revise."
        )
    blocks = recipe.blocks
    if isinstance(blocks, InBlocks) and isinstance(blocks.rule, AtDelimiter) and not blocks.rule.ids and tokenizer is not None:
        rule = blocks.rule.told(lambda word: tokenizer.encode(word, add_special_tokens=False))
        return recipe.model_copy(update={"blocks": InBlocks(rule=rule, end=blocks.end)})
    return recipe


def acts_on_texts(recipe: Recipe) -> None:
    """Raise `UsageError` for a recipe that is made for another kind of model."""
    name = f"Recipe {recipe.name!r}" if recipe.name else "The recipe"
    others = [axis for axis in recipe.axes if axis not in AXES]
    if others:
        raise UsageError(
            f"{name} sets {' and '.join(others)}, which {'act' if len(others) > 1 else 'acts'} on other kinds of models. Texts"
            f" that are written in any order have {', '.join(AXES)}; `hasten recipes` says what each recipe acts on."
        )
    for axis, part in recipe.axes.items():
        if not isinstance(part, AXES[axis]):
            raise UsageError(f"{name} has {axis} of kind {part.kind!r}, which is not for texts that are written in any order.")
