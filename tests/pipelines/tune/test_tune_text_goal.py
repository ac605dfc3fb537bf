"""Budgets of texts, and what a number of prompts can show."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.budget import Budget
from hasten.errors import UsageError
from hasten.pipelines.tune.text_goal import TextGoal, at_most, interval


@pytest.mark.parametrize("text", ["exact_match>=0.99", "exact_match >= 99%", "99%", " 99 % ", "0.99", "exact_match=.99"])
def test_one_budget_has_many_spellings(text: str) -> None:
    assert math.isclose(TextGoal.read(text).limit, 0.99)
    assert str(TextGoal.read(text)) == "exact_match >= 99 %"


@pytest.mark.parametrize("text", ["psnr>=30", "", "exact_match", "exact_match>=1.5", "99", "exact_match<=0.9", "0%", "-1%", "nan%"])
def test_what_is_no_budget_is_said_with_one_that_is(text: str) -> None:
    with pytest.raises(UsageError, match="exact_match>="):
        TextGoal.read(text)


def test_budgets_of_pictures_are_refused() -> None:
    with pytest.raises(UsageError, match="pictures"):
        TextGoal.read(Budget(psnr=30))


@pytest.mark.parametrize(("same", "total", "low", "high"), [(8, 10, 0.4439, 0.9748), (0, 10, 0, 0.3085), (10, 10, 0.6915, 1), (1, 1, 0.025, 1)])
def test_the_interval_is_that_of_clopper_and_pearson(same: int, total: int, low: float, high: float) -> None:
    assert interval(same, total) == pytest.approx((low, high), abs=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 400), st.data())
def test_intervals_hold_what_was_seen_and_grow_with_their_level(total: int, data: st.DataObject) -> None:
    same = data.draw(st.integers(0, total))
    low, high = interval(same, total)
    wider = interval(same, total, 0.999)
    assert 0 <= wider[0] <= low <= same / total <= high <= wider[1] <= 1
    mirrored = interval(total - same, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]))
def test_so_many_prompts_are_needed_and_no_fewer(limit: float) -> None:
    needed = TextGoal(limit).needed
    assert needed is not None
    assert interval(needed, needed)[0] >= limit > interval(needed - 1, needed - 1)[0]


def test_thirty_prompts_cannot_show_99_per_cent() -> None:
    assert TextGoal(0.99).needed == 368
    assert interval(30, 30)[0] < 0.89
    assert TextGoal(1.0).needed is None


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.floats(0.01, 0.99))
def test_probabilities_of_counts_add_up(total: int, share: float) -> None:
    steps = [at_most(count, total, share) for count in range(total + 1)]
    assert steps == sorted(steps) and steps[-1] == 1
    assert at_most(0, total, share) == pytest.approx((1 - share) ** total)
    mean = sum(1 - step for step in steps)  # E[X] = sum of P(X > k)
    assert mean == pytest.approx(total * share, rel=1e-6)
