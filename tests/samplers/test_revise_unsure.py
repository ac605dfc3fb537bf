"""Revisers that go by what was known when a token was written: by hand, and in the loop.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.canvas import DONE, Canvas
from hasten.noise import uniform
from hasten.pipelines.text.loop import TextLoop
from hasten.recipe import Recipe
from hasten.samplers.commit import Quota, Unmask
from hasten.samplers.revise import RevisePolicy, Reviser
from hasten.samplers.revise_unsure import Lapse, Outbid
from hasten.samplers.scores import Draw, Scores, best
from hasten.samplers.text_blocks import InBlocks, Whole
from tests.text_models import VOCAB, facts, open_canvas, prompts, scripted, tiny_llama


def step(reviser: Reviser, canvas: Canvas, confidence: list[float], count: int) -> tuple[list[int], list[int]]:
    """One step: the rule takes the `count` surest. confidence: of the open slots in order. Written and taken back, from 0."""
    scores = scripted(canvas, [confidence])
    among = scores.among(canvas)
    chosen = best(scores.rank, among, torch.tensor([count]))
    least = reviser.least(scores, chosen, canvas)
    assert least is not None
    now = chosen | best(scores.rank, among & ~chosen, least - chosen.sum(1))
    canvas.write(now, scores.token, scores.confidence)
    gone = reviser.revise(scores, now, canvas)
    canvas.step = canvas.step + 1
    written, back = ((x[0].nonzero()[:, 0] - int(canvas.start[0])).tolist() for x in (now, gone))
    return written, back


class TestOutbid:
    def canvas(self, new: int = 5) -> tuple[Canvas, Reviser]:
        canvas = open_canvas([2], [new])
        return canvas, Reviser(Outbid(), facts(), canvas)

    def test_a_surer_slot_takes_the_place(self) -> None:
        """0.9 and 0.6 are written; then 0.95 and 0.7 stand against them for three places."""
        canvas, reviser = self.canvas(4)
        assert step(reviser, canvas, [0.9, 0.5, 0.6, 0.2], 2) == ([0, 2], [])
        assert step(reviser, canvas, [0.95, 0.7], 1) == ([1, 3], [2])
        assert step(reviser, canvas, [0.1], 1) == ([2], [])
        assert not bool(canvas.masked.any())

    def test_nothing_falls_while_what_stands_is_surer(self) -> None:
        canvas, reviser = self.canvas()
        step(reviser, canvas, [0.9, 0.8, 0.1, 0.1, 0.1], 2)
        assert step(reviser, canvas, [0.7, 0.6, 0.5], 1) == ([2], [])

    def test_it_is_filling_everything_and_masking_the_lowest(self) -> None:
        """The authors' way, step by step, on confidences by chance."""
        for seed in range(20):
            canvas, reviser = self.canvas(7)
            known, done = torch.full((7,), -1.0), torch.zeros(7, dtype=torch.bool)
            for number, more in enumerate((2, 1, 2, 1)):
                fresh = uniform(torch.tensor(seed), torch.tensor(number), torch.arange(7), 1)[..., 0].float()
                step(reviser, canvas, fresh[~done].tolist(), more)
                known = torch.where(done, known, fresh)
                stays = int(done.sum()) + more
                done = torch.zeros(7, dtype=torch.bool).index_fill(0, known.topk(stays).indices, True)
                assert torch.equal(canvas.status[0, 2:] == DONE, done)

    def test_a_slot_comes_and_goes_as_often_as_the_budget_says(self) -> None:
        canvas = open_canvas([2], [4])
        reviser = Reviser(Outbid(budget=1), facts(), canvas)
        step(reviser, canvas, [0.3, 0.1, 0.1, 0.1], 1)
        assert step(reviser, canvas, [0.9, 0.8, 0.1], 1) == ([1, 2], [0])
        assert step(reviser, canvas, [0.2, 0.1], 1) == ([0], [])
        reviser.times[:] = 1
        assert step(reviser, canvas, [0.99], 1) == ([3], [])


class TestLapse:
    def sigma(self, policy: Lapse, confidence: list[float], done: int, count: int) -> Tensor:
        """The chances of the first `done` slots, written with these confidences, when the rule takes `count` more."""
        canvas = open_canvas([2], [len(confidence)])
        scores = scripted(canvas, [confidence])
        canvas.write(canvas.inside(canvas.start, canvas.start + done), scores.token, scores.confidence)
        state: Any = policy.start(facts())
        found: Tensor = state._sigma(torch.tensor([count]), canvas)
        return found[0, 2 : 2 + done]

    def test_cap_and_rescale(self) -> None:
        """Ten slots, four of them written, one more to be: alpha is 0.4, then 0.5, and sigma_max is 0.5 / 0.4, which is 1."""
        ten = [0.9] * 10
        assert self.sigma(Lapse(eta=0.25), ten, 4, 1).tolist() == [0.25] * 4
        assert self.sigma(Lapse(eta=0.25, schedule="rescale"), ten, 4, 1).tolist() == [0.25] * 4
        # 8 of 10, then 9: sigma_max = 0.1 / 0.8
        assert self.sigma(Lapse(eta=0.5), ten, 8, 1).tolist() == pytest.approx([0.125] * 8)
        assert self.sigma(Lapse(eta=0.5, schedule="rescale"), ten, 8, 1).tolist() == pytest.approx([0.0625] * 8)
        assert self.sigma(Lapse(eta=0.1), ten, 8, 1).tolist() == pytest.approx([0.1] * 8)
        assert self.sigma(Lapse(eta=1.0), ten, 8, 2).tolist() == [0.0] * 8, "nothing is open afterwards"

    def test_unsure_ones_sooner(self) -> None:
        found = self.sigma(Lapse(eta=1.0, schedule="rescale", unsure=True), [0.9, 0.2, 0.9, 0.9], 2, 1)
        weights = torch.softmax(torch.tensor([-0.9, -0.2], dtype=torch.float64), 0)
        assert found.tolist() == pytest.approx((0.5 * weights).tolist(), rel=1e-6)

    def test_late_only(self) -> None:
        assert self.sigma(Lapse(eta=0.5, late=0.5), [0.9] * 10, 4, 1).tolist() == [0.0] * 4
        assert self.sigma(Lapse(eta=0.5, late=0.5), [0.9] * 10, 5, 1).tolist() == [0.5] * 5

    def test_as_many_more_are_written(self) -> None:
        """With eta 1 all that may go goes, but one fewer than is written."""
        canvas = open_canvas([2], [9])
        reviser = Reviser(Lapse(eta=1.0), facts(), canvas)
        assert step(reviser, canvas, [0.5] * 9, 3) == ([0, 1, 2], [])
        written, gone = step(reviser, canvas, [0.5] * 6, 1)
        assert len(written) == 4 and gone == [0, 1, 2]
        assert int((canvas.status == DONE).sum()) == 4

    def test_chances_are_what_they_say(self) -> None:
        """Of 400 slots written, with eta 0.2, about 80 go; not the same with another seed, nor at the next step."""
        gone = []
        for seed in (1, 2):
            canvas = open_canvas([2], [900])
            reviser = Reviser(Lapse(eta=0.2), facts(), canvas, torch.tensor([seed]))
            step(reviser, canvas, [0.5] * 900, 400)
            gone.append(step(reviser, canvas, [0.5] * 500, 1)[1])
            later = step(reviser, canvas, [0.5] * int(canvas.eligible.sum()), 1)[1]
            assert 35 < len(set(later) & set(range(400)) - set(gone[-1])) < 95
        assert all(55 < len(each) < 105 for each in gone) and gone[0] != gone[1]


def settled(now: Any, store: Any) -> Tensor:
    """Logits that depend on how much is written."""
    store.note(now)
    written = (now.ids > 2).sum(1)[:, None].expand_as(now.target)
    return 12 * uniform(now.members[:, None].expand_as(now.target), written, now.target, VOCAB).float()


@pytest.mark.parametrize("policy", [Outbid(), Lapse(eta=0.3), Lapse(schedule="rescale", eta=1.0, unsure=True)])
def test_no_more_evaluations_than_the_quota_has(policy: RevisePolicy) -> None:
    """As many slots are written besides as are taken back, so that the schedule is kept; and something is taken back."""
    given, new = prompts([3, 0, 5]), [12, 7, 16]
    recipe = Recipe(commit=Unmask(rule=Quota(steps=6)), blocks=InBlocks(rule=Whole(), end=None), revise=policy)
    host = tiny_llama()
    loop = TextLoop(host, recipe, Canvas.of(given, new, host.facts), Draw(torch.arange(3)), evaluate=settled)
    seen: list[Scores] = []
    loop.run(lambda number, canvas, scores, rows: seen.append(scores))
    assert len(seen) <= 7 and not bool(loop.canvas.masked.any())
    assert loop.revise is not None and int(loop.revise.times.sum()) > 0


def test_chance_is_the_texts_own() -> None:
    """By its seed, not by its place: the same text with another seed loses other slots, with the same seed the same."""
    recipe = Recipe(commit=Unmask(rule=Quota(steps=6)), blocks=InBlocks(rule=Whole(), end=None), revise=Lapse(eta=0.5))
    host, lost = tiny_llama(), []
    for seeds in ([1, 2], [1, 3]):
        canvas = Canvas.of(prompts([3, 3]), [24, 24], host.facts)
        loop = TextLoop(host, recipe, canvas, Draw(torch.tensor(seeds)), evaluate=settled)
        loop.run()
        assert loop.revise is not None
        lost.append(loop.revise.times)
    assert torch.equal(lost[0][0], lost[1][0])
    assert not torch.equal(lost[0][0], lost[0][1]) and not torch.equal(lost[0][1], lost[1][1])
