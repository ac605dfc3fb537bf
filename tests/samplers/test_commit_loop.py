"""Every rule and score in the whole loop, on a model: batches, temperatures, what must be sequential decoding."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.caching.kv import Dual, Recompute
from hasten.canvas import Canvas
from hasten.recipe import Recipe
from hasten.samplers.commit import CommitRule, Either, Quota, Threshold, Unmask
from hasten.samplers.commit_sure import EntropyBound, Factor, Lead, Nearby, Runs
from hasten.samplers.scores import Certainty, Confidence, Score
from hasten.samplers.text_blocks import Fixed, InBlocks
from tests.contract_text import members
from tests.text_models import alone, generate, prompts, texts, tiny_llama

BLOCKS = InBlocks(rule=Fixed(size=5))
LENGTHS, NEW = [5, 9, 2], [10, 7, 12]


def recipe(rule: CommitRule, score: Score | None = None, **axes: Any) -> Recipe:
    return Recipe(commit=Unmask(rule=rule, score=score or Confidence()), blocks=BLOCKS, **axes)


@cache
def sequential(score: Score) -> list[list[int]]:
    return texts(generate(tiny_llama(), prompts(LENGTHS), NEW, recipe(Quota(), score)))


@pytest.mark.parametrize(
    "rule",
    [
        Threshold(above=1.0), Factor(factor=1e-4), EntropyBound(bound=0.0), Lead(by=1.0), Nearby(above=1.0, near=1.0),
        Runs(above=1.0, low=1.0), Either(rules=(Threshold(above=1.0), Quota())),
    ],
    ids=lambda rule: rule.kind,
)  # fmt: skip
def test_a_rule_that_is_never_sure_is_sequential(rule: CommitRule) -> None:
    score = Certainty() if isinstance(rule, EntropyBound) else Confidence()  # it writes the least entropy first
    assert texts(generate(tiny_llama(), prompts(LENGTHS), NEW, recipe(rule, score))) == sequential(score)


def agreeing(ids: Tensor, canvas: Canvas) -> Tensor:
    """A guide that has something against every third token."""
    return torch.where(ids % 3 > 0, ids, -1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rule", [param for param in members(CommitRule) if param.id != "oracle"])
def test_a_rule_in_a_batch(rule: CommitRule, temperature: float) -> None:
    given: dict[str, Any] = {"guide": agreeing} if rule.guided else {}
    made = recipe(rule, kv=Dual())
    together = texts(generate(tiny_llama(), prompts(LENGTHS), NEW, made, temperature, **given))
    single = [
        texts(generate(tiny_llama(), [prompt], [NEW[row]], made, temperature, row, **given))[0]
        for row, prompt in enumerate(prompts(LENGTHS))
    ]
    assert together == single


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("score", members(Score))
def test_a_score_in_a_batch(score: Score, temperature: float) -> None:
    made = recipe(Threshold(above=0.4), score, kv=Recompute())
    together = texts(generate(tiny_llama(), prompts(LENGTHS), NEW, made, temperature))
    assert together == alone(tiny_llama(), prompts(LENGTHS), NEW, made, temperature)


def test_steps_are_kept() -> None:
    """A quota for the whole text, shared out over blocks of 5, 5 and 2."""
    loop = generate(tiny_llama(), prompts([4]), 12, Recipe(commit=Unmask(rule=Quota(steps=5)), blocks=InBlocks(
        rule=Fixed(size=5), end=None)))  # fmt: skip
    assert loop.tally.evaluations.tolist() == [5]


def test_temperature_changes_what_is_written_and_a_seed_repeats_it() -> None:
    hot = [texts(generate(tiny_llama(), prompts(LENGTHS), NEW, recipe(Quota()), 1.5, seed)) for seed in (3, 3, 4)]
    assert hot[0] == hot[1] != hot[2]
