"""When a text is over, by hand.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hasten.canvas import Canvas
from hasten.samplers.scores import Scores
from hasten.samplers.text_ends import AtEmptyBlock, AtEndToken, AtPredictedEnd, AtSurestEnd, EndRule, EndState
from tests.contract import PartContract, parts
from tests.text_models import EOS_ID, PAD_ID, facts, open_canvas, scripted


@pytest.mark.parametrize("part", parts(EndRule))
class TestEveryEndRule(PartContract):
    family = EndRule

    def test_a_model_without_end_tokens_ends_nowhere(self, part: EndRule) -> None:
        canvas = open_canvas([2], [4])
        canvas.write(canvas.masked, torch.full_like(canvas.ids, EOS_ID), torch.ones_like(canvas.confidence))
        state = part.start(replace(facts(), eos_ids=()))
        end = state.ends(canvas, Scores.blank(canvas))
        assert end is None or torch.equal(end, canvas.end)

    def test_nothing_known_and_nothing_written_ends_nothing(self, part: EndRule) -> None:
        canvas = open_canvas([2, 0], [4, 3])
        end = part.start(facts()).ends(canvas, Scores.blank(canvas))
        assert end is None or torch.equal(end, canvas.end)

    def test_an_end_token_in_the_prompt_is_none(self, part: EndRule) -> None:
        canvas = open_canvas([3], [4])
        canvas.ids[0, 1] = EOS_ID
        end = part.start(facts()).ends(canvas, scripted(canvas, [[0.9] * 4]))
        assert end is None or torch.equal(end, canvas.end)


def wrote(canvas: Canvas, row: int, **slots: int) -> None:
    """Write tokens: s3=7 is token 7 into slot 3; then a step is over."""
    for name, token in slots.items():
        at = canvas.place == int(name[1:])
        chosen = at & (torch.arange(len(canvas.ids)) == row)[:, None]
        canvas.write(chosen, torch.full_like(canvas.ids, token), torch.ones_like(canvas.confidence))
    canvas.step = canvas.step + 1


def ended(state: EndState, canvas: Canvas, scores: Scores | None = None) -> list[int]:
    end = state.ends(canvas, Scores.blank(canvas) if scores is None else scores)
    return canvas.end.tolist() if end is None else end.tolist()


def test_an_end_token_counts_once_nothing_is_open_before_it() -> None:
    canvas, state = open_canvas([2, 2], [4, 4]), AtEndToken().start(facts())
    wrote(canvas, 0, s3=EOS_ID)
    assert ended(state, canvas) == [6, 6]
    wrote(canvas, 0, s2=7)
    assert ended(state, canvas) == [4, 6]
    wrote(canvas, 1, s2=EOS_ID, s3=EOS_ID)
    assert ended(state, canvas) == [4, 3], "the first one"


def test_a_block_of_nothing_but_ends_is_over() -> None:
    canvas, state = open_canvas([2, 2], [6, 6], [(4, 7), (4, 7)]), AtEmptyBlock().start(facts())
    wrote(canvas, 0, s4=EOS_ID, s5=PAD_ID)
    assert ended(state, canvas) == [8, 8]
    wrote(canvas, 0, s6=EOS_ID)
    wrote(canvas, 1, s4=EOS_ID, s5=7, s6=EOS_ID)
    assert ended(state, canvas) == [5, 8]


def test_a_text_that_is_over_has_no_empty_block() -> None:
    canvas, state = open_canvas([2, 2], [6, 6], [(4, 7), (4, 7)]), AtEmptyBlock().start(facts())
    canvas.open = torch.tensor([True, False])
    assert ended(state, canvas) == [8, 8]


class TestPredictedEnd:
    """One text of 2 + 6 slots; two evaluations, two slots behind."""

    RULE = AtPredictedEnd(above=0.9, steps=2, run=2)

    def after(self, *evaluations: tuple[list[float], list[int]], rule: AtPredictedEnd | None = None) -> list[int]:
        canvas, state = open_canvas([2], [6]), (rule or self.RULE).start(facts())
        found = []
        for confidence, token in evaluations:
            found += ended(state, canvas, scripted(canvas, [confidence], token=[token]))
        return found

    SURE = ([0.5, 0.5, 0.95, 0.5, 0.5, 0.5], [7, 7, EOS_ID, EOS_ID, EOS_ID, 7])

    def test_it_takes_two_evaluations(self) -> None:
        assert self.after(self.SURE, self.SURE) == [8, 5]

    def test_it_has_to_be_the_same_slot(self) -> None:
        other = ([0.5, 0.95, 0.5, 0.5, 0.5, 0.5], [7, EOS_ID, EOS_ID, EOS_ID, 7, 7])
        assert self.after(self.SURE, other, self.SURE) == [8, 8, 8]
        assert self.after(other, self.SURE, self.SURE) == [8, 8, 5]

    def test_it_has_to_be_sure(self) -> None:
        unsure = ([0.5, 0.5, 0.89, 0.5, 0.5, 0.5], self.SURE[1])
        assert self.after(unsure, unsure, unsure) == [8, 8, 8]

    def test_what_follows_has_to_agree(self) -> None:
        gap = (self.SURE[0], [7, 7, EOS_ID, EOS_ID, 7, EOS_ID])
        assert self.after(gap, gap) == [8, 8]

    def test_at_the_end_of_the_text_fewer_follow(self) -> None:
        last = ([0.5] * 5 + [0.95], [7] * 5 + [EOS_ID])
        assert self.after(last, last) == [8, 8], "it ends where it would anyway"
        but_one = ([0.5] * 4 + [0.95, 0.5], [7] * 4 + [EOS_ID, EOS_ID])
        assert self.after(but_one, but_one) == [8, 7]

    def test_the_leftmost_counts_not_the_surest(self) -> None:
        two = ([0.5, 0.91, 0.5, 0.99, 0.5, 0.5], [7] + [EOS_ID] * 5)
        assert self.after(two, two) == [8, 4]

    def test_an_evaluation_of_the_block_alone_says_nothing(self) -> None:
        canvas, state = open_canvas([2], [6]), self.RULE.start(facts())
        full, part = scripted(canvas, [self.SURE[0]], token=[self.SURE[1]]), Scores.blank(canvas)
        assert [ended(state, canvas, scores)[0] for scores in (full, part, full)] == [8, 8, 5]
        state = self.RULE.start(facts())
        assert [ended(state, canvas, scores)[0] for scores in (full, part, part)] == [8, 8, 8]

    def test_a_written_end_counts_at_once(self) -> None:
        canvas, state = open_canvas([2], [6]), self.RULE.start(facts())
        wrote(canvas, 0, s2=EOS_ID)
        assert ended(state, canvas) == [3]

    def test_texts_are_counted_one_by_one(self) -> None:
        canvas, state = open_canvas([2, 2], [6, 6]), self.RULE.start(facts())
        sure, other = self.SURE, ([0.1] * 6, [7] * 6)
        first = scripted(canvas, [sure[0], other[0]], token=[sure[1], other[1]])
        second = scripted(canvas, [sure[0], sure[0]], token=[sure[1], sure[1]])
        assert ended(state, canvas, first) == [8, 8]
        assert ended(state, canvas, second) == [5, 8]
        assert ended(state, canvas, second) == [5, 5]


class TestSurestEnd:
    """Learn2PD's own rule: the surest of all, without any threshold."""

    def test_the_surest_predicted_one_ends_the_text(self) -> None:
        canvas, state = open_canvas([2], [6]), AtSurestEnd().start(facts())
        token = [EOS_ID, 7, 7, EOS_ID, 7, EOS_ID]
        assert ended(state, canvas, scripted(canvas, [[0.1, 0.9, 0.9, 0.3, 0.9, 0.2]], token=[token])) == [6]

    def test_one_that_has_just_been_written_comes_first(self) -> None:
        canvas, state = open_canvas([2], [6]), AtSurestEnd().start(facts())
        scores = scripted(canvas, [[0.9] * 6], token=[[7, 7, EOS_ID, 7, 7, EOS_ID]])
        wrote(canvas, 0, s7=EOS_ID)
        assert ended(state, canvas, scores) == [8]
        canvas.step = canvas.step + 1
        assert ended(state, canvas, scores) == [5], "then the others"
