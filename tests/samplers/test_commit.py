"""Commit rules: what all of them keep, the paces of LLaDA and Dream, unions, steps chosen when generating."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.canvas import Canvas
from hasten.errors import RecipeError, UsageError
from hasten.part import parse
from hasten.recipe import Commit
from hasten.samplers.commit import CommitRule, Either, Falling, Quota, Threshold, Unmask
from hasten.samplers.commit_history import Steady
from hasten.samplers.commit_told import Agreed
from hasten.samplers.scores_history import Credit
from tests.contract_text import CommitRuleContract, members
from tests.text_models import open_canvas, picked, scripted


class TestContract(CommitRuleContract):
    @pytest.fixture(scope="class", params=members(CommitRule))
    def part(self, request: pytest.FixtureRequest) -> CommitRule:
        part: CommitRule = request.param
        return part


def counts(rule: CommitRule, new: int) -> list[int]:
    """How many slots of one block of `new` a rule writes at each step."""
    canvas, state, each = open_canvas([2], [new]), rule.start(), []
    while bool(canvas.eligible.any()):
        scores = scripted(canvas, [torch.rand(new).tolist()])
        chosen = state.select(scores, canvas)
        each.append(int(chosen.sum()))
        canvas.write(chosen, scores.token, scores.confidence)
        canvas.step, canvas.since = canvas.step + 1, canvas.since + 1
        assert len(each) <= 100
    return each


class TestQuota:
    @pytest.mark.parametrize(
        ("new", "steps", "expected"),
        [(7, 3, [3, 2, 2]), (8, 4, [2] * 4), (5, 5, [1] * 5), (5, None, [1] * 5), (3, 9, [1, 1, 1]), (6, 1, [6])],
    )
    def test_llada_s_table(self, new: int, steps: int | None, expected: list[int]) -> None:
        assert counts(Quota(steps=steps), new) == expected

    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 30), st.integers(1, 40))
    def test_it_takes_the_steps_it_was_given(self, new: int, steps: int) -> None:
        each = counts(Quota(steps=steps), new)
        assert len(each) == min(new, steps) and max(each) - min(each) <= 1

    def test_a_block_gets_its_share(self) -> None:
        canvas = open_canvas([2], [12], [(2, 8)])  # half of what is generated: half of the steps
        chosen = Quota(steps=6).start().select(scripted(canvas, [[0.1, 0.6, 0.5, 0.9, 0.2, 0.3]]), canvas)
        assert picked(canvas, chosen) == [[1, 3]]


class TestFalling:
    @pytest.mark.parametrize(("new", "steps"), [(12, 4), (10, 10), (7, 3), (1, 5)])
    def test_dream_s_table(self, new: int, steps: int) -> None:
        """floor(m (1 - s / t)) of the m open slots, all in the last evaluation."""
        levels = torch.linspace(1, 1e-3, min(steps, new) + 1, dtype=torch.float64)
        left, expected = new, []
        for i in range(min(steps, new)):
            last = i == min(steps, new) - 1
            expected.append(left if last else int(left * (1 - levels[i + 1] / levels[i])))
            left -= expected[-1]
        canvas, state, got = open_canvas([2], [new]), Falling(steps=steps).start(), []
        for _ in expected:
            scores = scripted(canvas, [torch.rand(new).tolist()])
            chosen = state.select(scores, canvas)
            got.append(int(chosen.sum()))
            canvas.write(chosen, scores.token, scores.confidence)
            canvas.since = canvas.since + 1
        assert got == expected and sum(got) == new

    def test_each_text_has_its_own_number(self) -> None:
        canvas = open_canvas([2, 2], [12, 3])
        scores = scripted(canvas, [torch.rand(12).tolist(), [0.1, 0.2, 0.3]])
        assert Falling(steps=3).start().select(scores, canvas).sum(1).tolist() == [3, 0]


class TestThreshold:
    def test_at_the_threshold_is_enough(self) -> None:
        canvas = open_canvas([1], [4])
        scores = scripted(canvas, [[0.5, 0.75, 0.7, 0.8]])
        assert picked(canvas, Threshold(above=0.75).start().select(scores, canvas)) == [[1, 3]]

    def test_it_is_about_confidence_whatever_the_order(self) -> None:
        canvas = open_canvas([1], [3])
        scores = scripted(canvas, [[0.5, 0.9, 0.7]], rank=[[3.0, 1.0, 2.0]])
        assert picked(canvas, Threshold(above=0.9).start().select(scores, canvas)) == [[1]]


class TestEither:
    def test_low_confidence_dynamic(self) -> None:
        """SDAR, LLaDA2: the sure ones where there are at least k, else the k surest."""
        rule = Either(rules=(Threshold(above=0.8), Quota(steps=2)))  # 3 of 6 slots a step
        canvas = open_canvas([1, 1], [6, 6])
        scores = scripted(canvas, [[0.9, 0.85, 0.95, 0.99, 0.1, 0.2], [0.9, 0.1, 0.2, 0.3, 0.4, 0.5]])
        assert picked(canvas, rule.start().select(scores, canvas)) == [[0, 1, 2, 3], [0, 4, 5]]

    def test_it_reads_back_from_yaml(self) -> None:
        commit = Unmask(rule=Either(rules=(Threshold(), Quota(steps=4))))
        assert parse(Commit, commit.model_dump(), "test") == commit

    def test_none_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="rules"):
            parse(CommitRule, {"kind": "either", "rules": []}, "test")


class TestSteps:
    def test_they_reach_the_quota_inside(self) -> None:
        given_ = Unmask(rule=Either(rules=(Threshold(), Quota(steps=4))), score=Credit()).with_steps(9)
        assert given_ == Unmask(rule=Either(rules=(Threshold(), Quota(steps=9))), score=Credit())
        assert Unmask(rule=Falling()).with_steps(3).rule == Falling(steps=3)
        assert Unmask(rule=Quota()).with_steps(3).rule == Quota(steps=3)

    def test_a_rule_without_a_pace_says_so(self) -> None:
        with pytest.raises(UsageError, match="'threshold' finds out itself"):
            Unmask(rule=Threshold()).with_steps(8)

    def test_fewer_than_one(self) -> None:
        with pytest.raises(UsageError, match="at least 1, got 0"):
            Unmask(rule=Quota()).with_steps(0)


@pytest.mark.parametrize(
    ("commit", "expected"),
    [
        (Unmask(rule=Threshold()), False),
        (Unmask(rule=Threshold(), score=Credit()), True),
        (Unmask(rule=Either(rules=(Threshold(), Steady()))), True),
        (Unmask(rule=Agreed()), True),
    ],
)
def test_what_remembers_is_known(commit: Unmask, expected: bool) -> None:
    assert commit.remembers is expected


def test_a_text_that_is_over_gets_nothing() -> None:
    canvas: Canvas = open_canvas([2, 2], [4, 4])
    canvas.open = torch.tensor([True, False])
    scores = scripted(canvas, [[0.9, 0.9, 0.1, 0.1], [0.9] * 4])
    for rule in (Threshold(above=0.0), Quota(steps=1), Falling(steps=1)):
        assert not bool(rule.start().select(scores, canvas)[1].any())
