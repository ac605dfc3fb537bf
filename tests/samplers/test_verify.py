"""Drafts: that nothing but time changes, with every cache, rule and temperature; and what they save.

Shapes: B texts, K drafts of each, L slots.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.caching.kv import Dual, Prefix, Recompute, TokenKV, Vicinity
from hasten.caching.kv_front import BlockCausal, Freeze, Nested
from hasten.caching.kv_scattered import Delayed
from hasten.canvas import TextFacts
from hasten.errors import RecipeError, RefusedError
from hasten.pipelines.text.loop import TextLoop
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.samplers.commit import CommitRule, Either, Quota, Threshold, Unmask
from hasten.samplers.commit_history import Steady
from hasten.samplers.commit_sure import AboveMean, EntropyBound, Factor
from hasten.samplers.revise_edit import Edit
from hasten.samplers.scores import Confidence, Margin, Score, Softened
from hasten.samplers.scores_history import Credit
from hasten.samplers.text_blocks import Fixed, InBlocks, SubBlocks, Whole, Window
from hasten.samplers.text_ends import AtPredictedEnd
from hasten.samplers.verify import FreeDave, Verifier
from tests.contract import PartContract, parts
from tests.text_models import generate, open_canvas, prompts, texts, tiny_llama

LENGTHS, NEW = [5, 9, 2], [10, 7, 12]
FREE = Recipe(verify=FreeDave(most=4))


def recipe(rule: CommitRule | None = None, score: Score | None = None, size: int = 6, **axes: Any) -> Recipe:
    commit = Unmask(rule=rule or Quota(), score=score or Confidence())
    return Recipe(commit=commit, **({"blocks": InBlocks(rule=Fixed(size=size))} | axes))


def run(made: Recipe, host: TextHost | None = None, temperature: float = 0.0, **given: Any) -> TextLoop:
    return generate(host or tiny_llama(), prompts(LENGTHS), NEW, made, temperature, **given)


def same(drafted: TextLoop, plain: TextLoop) -> None:
    """The same tokens, written at the same (sequential) steps with the same confidence; never more evaluations."""
    a, b = drafted.canvas, plain.canvas
    assert torch.equal(a.ids, b.ids) and torch.equal(a.committed, b.committed) and torch.equal(a.step, b.step)
    torch.testing.assert_close(a.confidence, b.confidence, equal_nan=True, atol=1e-4, rtol=1e-4)
    assert bool((drafted.tally.evaluations <= plain.tally.evaluations).all())


@pytest.mark.parametrize("part", parts(Verifier))
class TestEveryVerifier(PartContract):
    family = Verifier

    def test_what_is_lossless_changes_nothing(self, part: Verifier) -> None:
        if part.lossless:
            same(run(recipe(verify=part, kv=Dual())), run(recipe(kv=Dual())))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    ("block", "shifted", "kv"),
    [
        (None, False, Recompute()), (None, False, Prefix()), (None, False, Dual()), (None, True, Dual()),
        (None, True, Recompute()), (None, False, Vicinity(before=2, after=3, warmup=0)), (None, False, Freeze()),
        (4, False, BlockCausal()), (4, True, BlockCausal()), (4, False, Recompute()),
    ],
    ids=str,
)  # fmt: skip
def test_every_steady_cache_gives_the_same_text(block: int | None, shifted: bool, kv: TokenKV, temperature: float) -> None:
    host = tiny_llama(block, shifted)
    same(run(recipe(kv=kv) | FREE, host, temperature), run(recipe(kv=kv), host, temperature))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "rule",
    [
        Threshold(above=0.05), Quota(steps=8), Factor(factor=3.0), EntropyBound(bound=4.0),
        Either(rules=(Threshold(above=0.08), Quota(steps=14))),
    ],
    ids=lambda rule: rule.kind,
)  # fmt: skip
def test_every_rule_without_memory_is_reproduced(rule: CommitRule, temperature: float) -> None:
    """Rules that write several slots, too: a draft is right only if it is what the rule comes to."""
    plain = run(recipe(rule, kv=Dual(), size=8), temperature=temperature)
    assert int(plain.tally.evaluations.max()) < 12, "it should write several slots at once"
    same(run(recipe(rule, kv=Dual(), size=8) | FREE, temperature=temperature), plain)


def test_other_orders_and_nested_blocks() -> None:
    nested = InBlocks(rule=SubBlocks(size=8, inner=4))
    for made in (recipe(score=Margin(), kv=Dual()), recipe(score=Softened()), recipe(kv=Nested(), blocks=nested)):
        same(run(made | FREE), run(made))


def test_it_saves_evaluations() -> None:
    plain, drafted = run(recipe(blocks=InBlocks(rule=Whole()))), run(recipe(blocks=InBlocks(rule=Whole())) | FREE)
    assert plain.tally.evaluations.tolist() == NEW
    assert bool((drafted.tally.evaluations < plain.tally.evaluations).all())


def sharp(facts: TextFacts) -> Any:
    """Logits that depend on the slot alone: every draft is right."""

    def evaluate(now: Any, store: Any) -> Tensor:
        store.note(now)
        value = torch.zeros(*now.target.shape, facts.vocab)
        token = 5 + now.target % 7
        return value.scatter(-1, token[..., None], 3 + 0.01 * now.target[..., None].float())

    return evaluate


def test_where_all_drafts_are_right_each_call_writes_as_many() -> None:
    host = tiny_llama()
    loop = run(recipe(kv=Dual(), size=9) | FREE, host, evaluate=sharp(host.facts))
    # a block of 9: one slot, then 4 and 4; 7: 1, 4, 2; the blocks of 1 and 3 behind: 1; 1 and 2
    assert loop.tally.evaluations.tolist() == [3 + 1, 3, 3 + 2]
    assert loop.canvas.step.tolist() == NEW, "steps are those that decoding without drafts would have made"


def test_wrong_drafts_are_never_taken() -> None:
    """A model that changes its mind: the confidence of a slot depends on what else is written."""
    host = tiny_llama()

    def evaluate(now: Any, store: Any) -> Tensor:
        store.note(now)
        written = (now.ids > 2).sum(1)[:, None]
        value = torch.zeros(*now.target.shape, host.facts.vocab)
        token = 5 + (now.target + written) % 7
        return value.scatter(-1, token[..., None], 3 + 0.01 * ((now.target * 5 + written) % 11)[..., None].float())

    made = recipe(blocks=InBlocks(rule=Whole()))
    same(run(made | FREE, host, evaluate=evaluate), run(made, host, evaluate=evaluate))


def test_noise_is_that_of_the_step_which_a_draft_stands_for() -> None:
    """Slots come in threes: two that are written at once, then a coin that falls as its step's noise says. A draft that
    has both of the two is two levels up, but a single step on."""
    host, prompt = tiny_llama(), 5

    def evaluate(now: Any, store: Any) -> Tensor:
        written = ((now.ids > 2).sum(1) - prompt)[:, None]
        slot = now.target - prompt
        group, coin = slot // 3, slot % 3 == 2
        due = written >= 3 * group + 2 * coin
        sure = torch.where(coin, torch.where(due, 0.45, 0.2), torch.where(due, 0.9, 0.39 - 0.001 * group))
        first = 5 + slot % 7
        rest = ((1 - sure - torch.where(coin, sure, 0.0)) / 92)[..., None]  # two tokens are never written
        p = rest.expand(-1, -1, host.facts.vocab).scatter(-1, first[..., None], sure[..., None])
        return p.scatter(-1, first[..., None] + 20, torch.where(coin[..., None], sure[..., None], rest)).log()

    made = recipe(Threshold(above=0.4), blocks=InBlocks(rule=Whole(), end=None))
    drafted, plain = (
        generate(host, prompts([prompt] * 4), 12, one, 0.25, evaluate=evaluate) for one in (made | FREE, made)
    )
    assert plain.tally.evaluations.tolist() == [8] * 4
    same(drafted, plain)


def test_texts_do_not_know_of_each_other() -> None:
    made = recipe(kv=Dual()) | FREE
    for temperature in (0.0, 0.7):
        together = run(made, temperature=temperature)
        for row, (prompt, new) in enumerate(zip(prompts(LENGTHS), NEW, strict=True)):
            single = generate(tiny_llama(), [prompt], [new], made, temperature, seed=row)
            assert texts(single)[0] == texts(together)[row]
            for name in ("evaluations", "tokens"):
                assert int(getattr(single.tally, name)[0]) == int(getattr(together.tally, name)[row]), name


def test_tokens_of_drafts_are_counted() -> None:
    """Blocks of 6: all slots at the first step, then 6 for each draft; without a cache, all slots for each."""
    for kv, width in ((Dual(), 6), (Recompute(), 11)):
        loop = generate(tiny_llama(), prompts([5]), [6], recipe(kv=kv) | FREE)
        drafts = [4, 4, 3, 2, 1]  # at most; one slot is left open
        spent = int(loop.tally.tokens[0]) - 11
        assert spent % width == 0 and spent // width <= sum(drafts)


class TestNumberOfDrafts:
    def learnt(self, *passed: list[bool], share: float = 0.5, most: int = 6) -> list[int]:
        canvas, state = open_canvas([2], [9]), FreeDave(most=most, share=share).start(tiny_llama().facts)
        canvas.drafts = torch.full_like(canvas.drafts, most)
        found = []
        for path in passed:
            state.learn(torch.tensor([[True, *path]]), torch.tensor([len(path) + 1]), canvas)
            found.append(int(canvas.drafts))
        return found

    def test_it_follows_what_was_right(self) -> None:
        none, all_ = [False] * 5, [True] * 5
        assert self.learnt(none, none, none, none) == [4, 3, 2, 2]
        assert self.learnt(none, none, none, all_, all_)[-2:] == [5, 6]

    def test_a_call_without_drafts_teaches_nothing(self) -> None:
        assert self.learnt([], [])[-1] == 6

    def test_share_0_always_drafts_most(self) -> None:
        assert self.learnt([False] * 5, share=0.0) == [6]


@cache
def bad() -> list[tuple[Recipe, str]]:
    ends = InBlocks(rule=Fixed(size=6), end=AtPredictedEnd())
    return [
        (recipe(score=Credit()), "credit"), (recipe(Steady()), "steady"), (recipe(AboveMean()), "above-mean"),
        (recipe(blocks=ends), "predicted-end"), (recipe(blocks=InBlocks(rule=Window())), "window"),
        (recipe(revise=Edit()), "edit"), (recipe(kv=Delayed()), "delayed"), (recipe(kv=Dual(every=3)), "dual"),
        (recipe(kv=Vicinity()), "vicinity"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(9))
def test_what_drafts_would_change_is_refused(number: int) -> None:
    made, name = bad()[number]
    with pytest.raises(RecipeError, match=name):
        run(made | FREE)


def test_noise_instead_of_masks_is_refused() -> None:
    host = tiny_llama()
    unmasked = TextHost(host.model, TextFacts(2, 96, None, (2,)))
    with pytest.raises(RefusedError, match="masks"):
        run(recipe() | FREE, unmasked)
