"""Blocks and ends in the whole loop, on a model, with every kind of cache: a text does not know of the others."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from hasten.caching.kv import Dual, Prefix, Recompute, TokenKV, Vicinity
from hasten.caching.kv_front import BlockCausal, Freeze, Nested
from hasten.caching.kv_scattered import Delayed
from hasten.canvas import Canvas
from hasten.pipelines.text.loop import TextLoop
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.samplers.commit import Threshold, Unmask
from hasten.samplers.revise import RevisePolicy
from hasten.samplers.revise_edit import Edit
from hasten.samplers.revise_erase import Backtrack, NarrowOut, Remask
from hasten.samplers.scores import Draw, Scores
from hasten.samplers.text_blocks import AtDelimiter, BlockRule, Fixed, InBlocks, SubBlocks, Whole, Window
from hasten.samplers.text_ends import AtEmptyBlock, AtEndToken, AtPredictedEnd, AtSurestEnd, EndRule
from tests.text_models import facts, generate, prompts, texts, tiny_llama

LENGTHS, NEW = [5, 9, 2], [10, 7, 14]
BLOCKS = (Whole(), Fixed(size=5), SubBlocks(size=8, inner=3), Window(size=4), AtDelimiter(ids=tuple(range(3, 40)), above=0.02))
CACHES = (Recompute(), Prefix(), Dual(), Vicinity(before=2, after=2, warmup=1), Freeze(), Nested(), Delayed(every=3))
ENDS = (AtEndToken(), AtEmptyBlock(), AtPredictedEnd(above=0.02, steps=1, run=1), AtSurestEnd(), None)
REVISERS = (Edit(above=0.03), Remask(below=0.1), Backtrack(least=0.0), NarrowOut())


@cache
def host(block: int | None = None, shifted: bool = False) -> TextHost:
    """With many end tokens, so that texts do end before all is written."""
    told = replace(facts(block, shifted), eos_ids=tuple(range(40, 72)))
    return TextHost(tiny_llama().model, told)


def recipe(rule: BlockRule, end: EndRule | None, kv: TokenKV, revise: RevisePolicy | None = None) -> Recipe:
    commit = Unmask(rule=Threshold(above=0.12))
    return Recipe(kv=kv, commit=commit, blocks=InBlocks(rule=rule, end=end), revise=revise)


def apart(made: Recipe, model: TextHost, temperature: float) -> TextLoop:
    """A batch and each text alone: the same texts at the same cost."""
    together = generate(model, prompts(LENGTHS), NEW, made, temperature)
    canvas = together.canvas
    assert not bool(canvas.masked.any()) and bool((canvas.end > canvas.start).all())
    for row, prompt in enumerate(prompts(LENGTHS)):
        single = generate(model, [prompt], [NEW[row]], made, temperature, seed=row)
        assert texts(single)[0] == texts(together)[row]
        for name in ("evaluations", "tokens"):
            assert int(getattr(single.tally, name)[0]) == int(getattr(together.tally, name)[row]), name
    return together


@pytest.mark.parametrize("kv", CACHES, ids=lambda kv: kv.kind)
@pytest.mark.parametrize("rule", BLOCKS, ids=lambda rule: rule.kind)
def test_every_block_rule_with_every_cache(rule: BlockRule, kv: TokenKV) -> None:
    apart(recipe(rule, AtEndToken(), kv), host(), 0.0)


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("rule", BLOCKS, ids=lambda rule: rule.kind)
def test_every_block_rule_on_every_kind_of_model(rule: BlockRule, block: int | None) -> None:
    kv = BlockCausal() if block else Dual()
    for shifted in (False, True):
        made = apart(recipe(rule, AtEndToken(), kv), host(block, shifted), 0.6)
        if block:  # an exact cache is one with every block rule
            full = generate(host(block, shifted), prompts(LENGTHS), NEW, recipe(rule, AtEndToken(), Recompute()), 0.6)
            assert texts(full) == texts(made)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.kind if end else "none")
def test_every_end_with_blocks_and_caches(end: EndRule | None) -> None:
    for rule, kv in ((Whole(), Recompute()), (Fixed(size=5), Dual()), (Window(size=4), Prefix()), (SubBlocks(), Nested())):
        found = apart(recipe(rule, end, kv), host(), 0.6)
        lengths = (found.canvas.end - found.canvas.start).tolist()
        assert (lengths == NEW) if end is None else all(short <= full for short, full in zip(lengths, NEW, strict=True))


def test_ends_save_work() -> None:
    made = [generate(host(), prompts(LENGTHS), NEW, recipe(Whole(), end, Recompute())) for end in (None, *ENDS[2:4])]
    full, *short = (int(loop.tally.tokens.sum()) for loop in made)
    assert all(tokens < full for tokens in short)


@pytest.mark.parametrize("revise", REVISERS, ids=lambda revise: revise.kind)
def test_every_reviser_with_blocks_and_caches(revise: RevisePolicy) -> None:
    for rule, kv in ((Window(size=4), Recompute()), (SubBlocks(size=8, inner=4), Nested()), (Fixed(size=5), Delayed(every=3))):
        apart(recipe(rule, AtEndToken(), kv, revise), host(), 0.0)


def test_delimiters_end_blocks_in_the_loop() -> None:
    """All tokens are delimiters: each block ends with its surest slot within the share that is looked at."""
    spans: list[Any] = []

    def watch(number: int, canvas: Canvas, scores: Scores, rows: list[Any]) -> None:
        spans.append([(row.low, row.high, row.since) for row in rows])

    model = host()
    made = recipe(AtDelimiter(ids=tuple(range(96)), above=0.0, share=0.5, size=7), None, Dual())
    loop = TextLoop(model, made, Canvas.of(prompts([4]), [12], model.facts), Draw(torch.zeros(1, dtype=torch.int64)))
    loop.run(watch)
    before_first_look = [span[0] for span in spans if span[0][2] == 0]
    ends = [span[0][1] for span in spans if span[0][2] > 0]
    assert all(high - low == 7 or high == 16 for low, high, _ in before_first_look), "the default, until it is looked at"
    assert all(high <= 16 for high in ends) and len(before_first_look) > 2


def test_the_window_moves_after_each_step() -> None:
    found = generate(host(), prompts(LENGTHS), NEW, recipe(Window(size=4), None, Recompute()))
    rows = [row for step in found.tally.rows for row in step if row.open]
    assert all(row.left == min(4, row.masks) for row in rows)
