"""Widths: shares between 0 and 1 by step and block; what is kept of them; one decision per step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hasten
from hasten.caching.histories import key_of
from hasten.caching.rules import Every
from hasten.caching.width import Shares, StraightWidth, Width, WidthReuse, WidthTable, kept, ranked
from hasten.part import Part, parse
from hasten.recipe import ReusePolicy
from hasten.step import Step
from tests.contract import PartContract, parts, seeded, steps


class TestWidths(PartContract):
    family = Width

    @pytest.fixture(params=parts(Width))
    def part(self, request: pytest.FixtureRequest) -> Part:
        return request.param  # type: ignore[no-any-return]

    def test_what_can_be_changed_says_how(self, part: Part) -> None:
        assert (type(part).__doc__ or "").strip(), "a width has no running state, so it has no start()"

    @pytest.mark.parametrize("total", [1, 2, 50])
    @pytest.mark.parametrize("num", [1, 12])
    def test_shares_are_shares(self, part: Width, total: int, num: int) -> None:
        for step in steps(total):
            for block in range(num):
                shares = part.at(step, block, num)
                assert 0 <= shares.heads <= 1 and 0 <= shares.channels <= 1
                assert part.at(step, block, num) == shares


def test_straight_width_follows_the_step() -> None:
    width = StraightWidth(early=0.25, late=1.0, heads=False)
    assert [width.at(Step(i, 4, 0.5), 0, 6) for i in range(4)] == [Shares(1.0, share) for share in (0.25, 0.5, 0.75, 1.0)]


def test_table_by_stage_and_block() -> None:
    table = WidthTable(channels=((0.25, 0.5), (1.0, 0.75)), heads=((0.5,),))
    found = [[table.at(Step(i, 4, 0.5), block, 2) for block in range(2)] for i in range(4)]
    assert [[shares.channels for shares in row] for row in found] == [[0.25, 0.5], [0.25, 0.5], [1.0, 0.75], [1.0, 0.75]]
    assert all(shares.heads == 0.5 for row in found for shares in row)
    with pytest.raises(hasten.RecipeError, match="2 shares in a row, and this network has 3 blocks"):
        table.at(Step(0, 4, 0.5), 0, 3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        WidthTable(heads=((1.5,),))


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_count_is_its_own_share(count: int, num: int) -> None:
    """No rounding of a table's shares adds a channel."""
    count = min(count, num)
    assert kept(count / num, num) == count
    assert kept(0.0, num) == 1 and kept(1.0, num) == num


def test_the_most_important_come_first() -> None:
    assert ranked(torch.tensor([1.0, 5.0, 5.0, 2.0])).tolist() == [1, 2, 3, 0]


def test_the_width_of_the_last_full_step_is_kept_where_the_rest_is_held() -> None:
    width = StraightWidth(early=0.2, late=1.0)
    held, run = WidthReuse(width=width, rule=Every(interval=2)).start(), steps(9)
    free, found = WidthReuse(width=width).start(), []
    for step in run:
        held.begin(step)
        free.begin(step)
        found.append((held.full, held.shares(step, 0, 1).heads, free.full))
    assert [full for full, _, _ in found[:4]] == [True, False, True, False]
    assert [round(share, 3) for _, share, _ in found[:4]] == [0.2, 0.2, 0.4, 0.4]
    assert not any(full for _, _, full in found), "without a rule no step is full"


def test_a_rest_that_is_not_finite_is_forgotten() -> None:
    state, run, x = WidthReuse(rule=Every(interval=9)).start(), steps(9), seeded(0, 4)
    state.begin(run[0])
    state.learn(run[0], "a", key_of(x), [x])
    state.begin(run[1])
    assert state.rests_of(run[1], "a", key_of(x)) is not None and not state.full
    state.rests.check(0, [torch.tensor([float("nan")])])
    state.begin(run[2])
    assert state.rests_of(run[2], "a", key_of(x)) is None and state.full


@pytest.mark.parametrize("kind", ["drift", "ledger"])
def test_a_rule_that_needs_a_signal_is_refused(kind: str) -> None:
    with pytest.raises(hasten.RecipeError, match="width measures none"):
        parse(ReusePolicy, {"kind": "width", "rule": {"kind": kind}}, "test")
