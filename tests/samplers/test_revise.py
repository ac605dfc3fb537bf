"""Revisers: what each takes back or replaces, by hand; and what holds for all of them, even the most unreasonable.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hasten.samplers.revise_edit
import hasten.samplers.revise_erase  # noqa: F401  imports every reviser
from hasten.canvas import DONE, PROMPT, Canvas, TextFacts
from hasten.errors import RefusedError
from hasten.noise import uniform
from hasten.pipelines.text.loop import TextLoop
from hasten.recipe import Recipe
from hasten.samplers.commit import CommitRule, Quota, Threshold, Unmask
from hasten.samplers.commit_wide import WideIn
from hasten.samplers.revise import RevisePolicy, Reviser, ReviseState, Revision
from hasten.samplers.revise_edit import Edit
from hasten.samplers.revise_erase import Backtrack, NarrowOut, Remask
from hasten.samplers.revise_unsure import Lapse
from hasten.samplers.scores import Scores
from hasten.samplers.text_blocks import Fixed, InBlocks
from tests.contract import PartContract, parts
from tests.text_models import (
    FIRST,
    MASK_ID,
    VOCAB,
    facts,
    generate,
    open_canvas,
    prompts,
    scripted,
    texts,
    tiny_llama,
)


class Unreasonable(RevisePolicy):
    """Test: wants to take back, replace and hold whatever it can, by chance."""

    kind: ClassVar[str] = ""
    seed: int = 0
    erases: float = 0.5
    replaces: float = 0.5
    holds: float = 1.0
    wants: int = 1

    def start(self, facts: TextFacts) -> ReviseState:
        return _UnreasonableState(self)


class _UnreasonableState(ReviseState):
    def __init__(self, policy: Unreasonable) -> None:
        self.policy, self.calls = policy, 0

    def chance(self, canvas: Canvas, share: float) -> Tensor:
        self.calls += 1
        seed = torch.full_like(canvas.ids, self.policy.seed)
        return uniform(seed, torch.tensor(self.calls), canvas.place, 1)[..., 0] < share

    def least(self, scores: Scores, chosen: Tensor, may: Tensor, canvas: Canvas) -> Tensor | None:
        return torch.full_like(canvas.start, self.policy.wants)

    def revise(self, scores: Scores, written: Tensor, may: Tensor, canvas: Canvas) -> Revision:
        erase, swap = self.chance(canvas, self.policy.erases), self.chance(canvas, self.policy.replaces)
        return Revision(erase, swap, (canvas.ids + 1).clamp(max=VOCAB - 1))

    def holds(self, canvas: Canvas) -> Tensor | None:
        return self.chance(canvas, self.policy.holds)[:, 0]


def noisy(now: Any, store: Any) -> Tensor:
    """Logits of a slot that depend on how much of the text is written: no model, and never the same twice."""
    store.note(now)
    written = (now.ids > 2).sum(1)[:, None].expand_as(now.target)
    return 12 * uniform(now.members[:, None].expand_as(now.target), written, now.target, VOCAB).float()


class Watch:
    """What must hold after each step."""

    def __init__(self, given: list[Tensor]) -> None:
        self.given, self.steps, self.most = given, 0, 0

    def __call__(self, number: int, canvas: Canvas, scores: Scores, rows: Any) -> None:
        self.steps = number + 1
        assert number < 200, "it should have ended long ago"
        for row, prompt in enumerate(self.given):
            assert torch.equal(canvas.ids[row, : len(prompt)], prompt)
            assert bool((canvas.status[row, : len(prompt)] == PROMPT).all())
        assert not bool(((canvas.ids == MASK_ID) & (canvas.status == DONE)).any())
        assert torch.equal(canvas.status == DONE, canvas.committed >= 0)


def run(recipe: Recipe, lengths: list[int], new: list[int], evaluate: Any = noisy, **given: Any) -> tuple[TextLoop, Watch]:
    from hasten.samplers.scores import Draw

    host, texts_ = tiny_llama(), prompts(lengths)
    canvas = Canvas.of(texts_, new, host.facts)
    loop, watch = TextLoop(host, recipe, canvas, Draw(torch.arange(len(new))), evaluate=evaluate), Watch(texts_)
    loop.run(watch)
    return loop, watch


def recipe(revise: RevisePolicy | None, rule: CommitRule | None = None, size: int = 5, end: bool = False) -> Recipe:
    blocks = InBlocks(rule=Fixed(size=size)) if end else InBlocks(rule=Fixed(size=size), end=None)
    return Recipe(commit=Unmask(rule=rule or Threshold(above=0.03)), blocks=blocks, revise=revise)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=3), st.integers(1, 6),
    st.integers(1, 3), st.integers(0, 1 << 20), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 9),
)  # fmt: skip
def test_any_reviser_ends_in_time(
    lengths: list[tuple[int, int]], size: int, budget: int, seed: int, erases: float, replaces: float, wants: int
) -> None:
    """Within (budget + 1) n steps, whatever it demands; prompts stay, and no mask is left."""
    policy = Unreasonable(seed=seed, erases=erases, replaces=replaces, budget=budget, wants=wants)
    starts, new = [start for start, _ in lengths], [count for _, count in lengths]
    loop, watch = run(recipe(policy, size=size), starts, new)
    assert watch.steps <= (budget + 1) * max(new)
    assert bool((loop.tally.evaluations <= (budget + 1) * torch.tensor(new)).all())
    assert not bool(loop.canvas.masked.any())
    assert loop.revise is not None and int(loop.revise.times.max()) <= budget


def test_the_bound_is_reached() -> None:
    """One that always replaces and always holds: each slot budget times, one at a time."""

    class One(Unreasonable):
        def start(self, facts: TextFacts) -> ReviseState:
            return _OneState(self)

    class _OneState(_UnreasonableState):
        def revise(self, scores: Scores, written: Tensor, may: Tensor, canvas: Canvas) -> Revision:
            first = may & (may.cumsum(1) == 1) & ~written.any(1)[:, None]
            return Revision(None, first, (canvas.ids + 1) % VOCAB)

    _, watch = run(recipe(One(budget=3), Quota(), size=4), [2], [4])
    assert watch.steps == (3 + 1) * 4


class TestReviser:
    def reviser(self, canvas: Canvas, **asked: Any) -> Reviser:
        class Asks(RevisePolicy):
            kind: ClassVar[str] = ""

            def start(self, facts: TextFacts) -> ReviseState:
                class State(ReviseState):
                    def revise(self, scores: Scores, written: Tensor, may: Tensor, canvas: Canvas) -> Revision:
                        return Revision(**asked)

                    def holds(self, canvas: Canvas) -> Tensor | None:
                        return torch.ones_like(canvas.open)

                return State()

        return Reviser(Asks(budget=1), facts(), canvas)

    def written(self, new: int = 6, done: int = 4) -> tuple[Canvas, Scores, Tensor]:
        """One text of 2 + new slots, `done` of which have been written; two more are written now."""
        canvas = open_canvas([2], [new])
        scores = scripted(canvas, [[0.9] * new])
        canvas.write(canvas.inside(canvas.start, canvas.start + done), scores.token, scores.confidence)
        scores.present = torch.where(canvas.status == DONE, 0.5 + 0.01 * canvas.place, float("nan"))
        now = canvas.inside(canvas.start + done, canvas.start + done + 2)
        canvas.write(now, scores.token, scores.confidence)
        return canvas, scores, now

    def test_fewer_are_taken_back_than_were_written_the_least_probable_first(self) -> None:
        canvas, scores, now = self.written()
        changed = self.reviser(canvas, erase=torch.ones_like(now)).revise(scores, now, canvas)
        assert changed[0].nonzero()[:, 0].tolist() == [2]
        assert canvas.masked[0].nonzero()[:, 0].tolist() == [2] and int(canvas.ids[0, 2]) == MASK_ID

    def test_prompts_and_fresh_slots_stay(self) -> None:
        """Also where the active block reaches into the prompt."""
        canvas, scores, now = self.written()
        canvas.move(canvas.open, torch.tensor([[0, 8]]))
        reviser = self.reviser(canvas, replace=torch.ones_like(now), token=torch.full_like(canvas.ids, 77))
        assert reviser.revise(scores, now, canvas)[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5]
        assert canvas.ids[0].tolist() == [FIRST, FIRST, 77, 77, 77, 77, 5, 5]
        assert not bool(reviser.revise(scores, now, canvas).any()), "once each: the budget is 1"

    def test_the_same_token_is_no_change(self) -> None:
        canvas, scores, now = self.written()
        reviser = self.reviser(canvas, replace=torch.ones_like(now), token=canvas.ids)
        assert not bool(reviser.revise(scores, now, canvas).any())

    def test_only_the_active_block_is_revised(self) -> None:
        canvas, scores, now = self.written()
        canvas.move(canvas.open, torch.tensor([[4, 8]]))
        reviser = self.reviser(canvas, replace=torch.ones_like(now), token=torch.full_like(canvas.ids, 77))
        assert reviser.revise(scores, now, canvas)[0].nonzero()[:, 0].tolist() == [4, 5]

    def test_a_full_block_is_held_only_while_something_changes(self) -> None:
        canvas, scores, now = self.written()
        reviser, none = self.reviser(canvas, erase=None), torch.zeros_like(now)
        reviser.revise(scores, now, canvas)
        assert reviser.holds(canvas).tolist() == [True]  # type: ignore[union-attr]
        reviser.revise(scores, none, canvas)
        assert reviser.holds(canvas).tolist() == [False]  # type: ignore[union-attr]

    def test_a_block_that_may_not_change_any_more_is_not_held(self) -> None:
        canvas, scores, now = self.written()
        every = torch.ones_like(now)
        reviser = self.reviser(canvas, replace=every, token=torch.full_like(canvas.ids, 77))
        reviser.times = reviser.times + 1
        reviser.revise(scores, now, canvas)
        assert reviser.holds(canvas).tolist() == [False]  # type: ignore[union-attr]


class TestBacktrack:
    """One text; slots 2 to 5 written with confidence 0.9, then two per step."""

    def steps(self, policy: Backtrack, present: list[list[float]], new: int = 12, each: int = 2) -> list[list[int]]:
        """present: of slots 2, 3, ... at each evaluation. Which slots are taken back after each."""
        canvas, gone = open_canvas([2], [new]), []
        reviser = Reviser(policy, facts(), canvas)
        for values in present:
            scores = scripted(canvas, [[0.9] * int(canvas.eligible.sum())])
            scores.seen = canvas.active.clone()
            known = torch.full_like(scores.present, float("nan"))
            known[0, 2 : 2 + len(values)] = torch.tensor(values)
            scores.present = torch.where(canvas.status == DONE, known, float("nan"))
            now = canvas.eligible & (canvas.eligible.cumsum(1) <= each)
            canvas.write(now, scores.token, scores.confidence)
            gone.append(reviser.revise(scores, now, canvas)[0].nonzero()[:, 0].tolist())
        return gone

    def test_the_largest_drop_goes(self) -> None:
        assert self.steps(Backtrack(), [[], [0.7, 0.6]]) == [[], [3]]

    def test_drops_are_counted_from_the_last_evaluation(self) -> None:
        """0.9, 0.86, 0.82: never more than 0.05 at once. Four slots are written when slot 2 has fallen for good."""
        assert self.steps(Backtrack(), [[], [0.86, 0.9], [0.82, 0.9], [0.76, 0.9]]) == [[], [], [], [2]]

    def test_small_drops_stay_but_the_papers_rule_takes_them(self) -> None:
        assert self.steps(Backtrack(), [[], [0.86, 0.89]]) == [[], []]
        assert self.steps(Backtrack(least=0.0), [[], [0.86, 0.89]]) == [[], [2]]
        assert self.steps(Backtrack(least=0.0), [[], [0.9, 0.95]]) == [[], []], "a gain is no drop"

    def test_as_many_as_the_share_of_what_was_written(self) -> None:
        low = [0.1, 0.2, 0.3, 0.4]
        assert self.steps(Backtrack(share=2), [[], low], each=4)[1] == [2, 3]
        assert self.steps(Backtrack(share=8), [[], low], each=4)[1] == [2]
        assert self.steps(Backtrack(share=1), [[], low], each=4)[1] == [2, 3, 4], "fewer than were written"

    def test_a_single_slot_is_kept(self) -> None:
        assert self.steps(Backtrack(), [[], [0.1]], each=1) == [[], []]


def test_remask_writes_as_many_and_one_more() -> None:
    """Three slots look wrong; the rule alone would write one."""
    canvas = open_canvas([2], [10])
    scores = scripted(canvas, [[0.9] * 10])
    canvas.write(canvas.inside(canvas.start, canvas.start + 5), scores.token, scores.confidence)
    known = torch.full_like(scores.present, float("nan"))
    known[0, 2:7] = torch.tensor([0.3, 0.41, 0.1, 0.39, 0.9])
    scores.present = known
    reviser = Reviser(Remask(), facts(), canvas)
    least = reviser.least(scores, scores.among(canvas), canvas)
    assert least is not None and least.tolist() == [4]
    now = canvas.eligible & (canvas.eligible.cumsum(1) <= 4)
    canvas.write(now, scores.token, scores.confidence)
    assert reviser.revise(scores, now, canvas)[0].nonzero()[:, 0].tolist() == [2, 4, 5]


def test_remask_in_the_loop_gains_a_slot_at_every_step() -> None:
    loop, watch = run(recipe(Remask(below=1.0), Quota(), size=9), [3, 0], [9, 7])
    assert watch.steps <= 9 and loop.revise is not None and int(loop.revise.times.sum()) > 0


class TestEdit:
    def edited(self, policy: Edit, confidence: list[float], token: list[int]) -> list[int]:
        """Three slots written as 5, the rest open; what stands in them afterwards."""
        canvas = open_canvas([2], [5])
        scores = scripted(canvas, [confidence], token=[token])
        scores.seen = canvas.active.clone()
        first = canvas.inside(canvas.start, canvas.start + 3)
        canvas.write(first, torch.full_like(canvas.ids, 5), scores.confidence)
        now = canvas.eligible & (canvas.eligible.cumsum(1) == 1)
        canvas.write(now, scores.token, scores.confidence)
        Reviser(policy, facts(), canvas).revise(scores, now, canvas)
        return canvas.ids[0, 2:].tolist()

    def test_another_token_that_is_sure_is_written(self) -> None:
        assert self.edited(Edit(), [0.9, 0.5, 0.51, 0.9, 0.9], [6, 7, 8, 9, 9]) == [6, 5, 8, 9, MASK_ID]

    def test_a_full_block_is_looked_at_until_nothing_changes(self) -> None:
        """Predictions say 6 to 9, one after the other; then nothing new."""
        for after, expected in ((16, 4 + 5), (2, 4 + 2), (0, 4)):
            host, count = tiny_llama(), [0]

            def evaluate(now: Any, store: Any, host: Any = host, count: list[int] = count) -> Tensor:
                store.note(now)
                count[0] += 1
                value = torch.zeros(*now.target.shape, VOCAB)
                value[..., 5 + min(max(count[0] - 4, 0), 4)] = 9
                return value

            loop, watch = run(recipe(Edit(after=after), Quota(), size=4), [2], [4], evaluate)
            assert watch.steps == expected, after
            assert loop.canvas.ids[0, 2:].tolist() == [5 + min(expected - 4, 4)] * 4

    def test_texts_end_as_they_would_without_it(self) -> None:
        """An end token cuts the text before the block is looked at again."""
        loop, _ = run(recipe(Edit(), size=4, end=True), [2, 5], [9, 6])
        assert bool((loop.canvas.end >= loop.canvas.start).all())


class TestWideIn:
    def taken(self, confidence: list[float], rule: WideIn | None = None) -> list[int]:
        canvas = open_canvas([2], [len(confidence)])
        scores = scripted(canvas, [confidence])
        return (rule or WideIn()).start().select(scores, canvas)[0].nonzero()[:, 0].sub(2).tolist()

    def test_all_above_but_the_surest_of_many(self) -> None:
        assert self.taken([0.6, 0.61, 0.9, 0.1]) == [1, 2]
        assert len(self.taken([0.9] * 10)) == 7 and len(self.taken([0.9] * 40)) == 20 and len(self.taken([0.9] * 6)) == 5
        assert self.taken([0.7, 0.9, 0.8], WideIn(least=1, share=0.4)) == [1]


@pytest.mark.parametrize("part", [part for part in parts(RevisePolicy) if part.id])
class TestEveryReviser(PartContract):
    family = RevisePolicy

    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_texts_do_not_know_of_each_other(self, part: RevisePolicy, temperature: float) -> None:
        made = recipe(part, WideIn(above=0.02, least=2), end=True)
        lengths, new = [5, 9, 2], [10, 7, 12]
        together = generate(tiny_llama(), prompts(lengths), new, made, temperature)
        for row, prompt in enumerate(prompts(lengths)):
            single = generate(tiny_llama(), [prompt], [new[row]], made, temperature, seed=row)
            assert texts(single)[0] == texts(together)[row]
            assert int(single.tally.tokens[0]) == int(together.tally.tokens[row])

    def test_it_revises_something(self, part: RevisePolicy) -> None:
        eager = {"edit": Edit(above=0.0), "lapse": Lapse(eta=0.5)}  # noise is never that sure, and texts are short
        rule = WideIn(above=0.02, least=4) if part.written else Quota(steps=8)
        loop, _ = run(recipe(eager.get(part.kind, part), rule, size=9), [3, 4], [9, 9])
        assert loop.revise is not None and int(loop.revise.times.sum()) > 0


def test_shadows_need_masks_where_the_logits_are() -> None:
    with pytest.raises(RefusedError, match="shifted"):
        NarrowOut().start(facts(shifted=True))
    with pytest.raises(RefusedError, match="masks"):
        NarrowOut().start(replace(facts(), mask_id=None))
