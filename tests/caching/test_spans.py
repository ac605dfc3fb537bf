"""Spans: what may be left out lies within the network, in order, and never overlaps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.caching.spans import BlockShare, Chosen, Itinerary, Piece, RearThenFront, Span, cut, runs
from hasten.errors import RecipeError
from hasten.part import Part, parse
from hasten.step import Step
from tests.contract import PartContract

NEEDED: dict[str, dict[str, Any]] = {"chosen": {"blocks": (0, 1, 3)}}


class TestSpans(PartContract):
    family = Span

    @pytest.fixture(params=sorted(Span.members()))
    def part(self, request: pytest.FixtureRequest) -> Part:
        return Span.members()[request.param](**NEEDED.get(request.param, {}))

    def test_what_can_be_changed_says_how(self, part: Part) -> None:
        assert (type(part).__doc__ or "").strip(), "a span has no running state, so it has no start()"

    @pytest.mark.parametrize("num", [0, 1, 2, 3, 5, 30])
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
    def test_ranges_are_within_the_network_and_apart(self, part: Span, num: int, share: float) -> None:
        ranges = part.at(share, num)
        borders = [border for pair in ranges for border in pair]
        assert borders == sorted(borders) and all(start < stop for start, stop in ranges)
        assert all(0 <= border <= num for border in borders)

    def test_it_leaves_something_out(self, part: Span) -> None:
        assert part.at(0.0, 12) and part.at(1.0, 12)


def test_rear_early_front_late() -> None:
    span = RearThenFront(share=0.75, switch=0.5)
    assert span.at(0.0, 8) == ((2, 8),) and span.at(0.49, 8) == ((2, 8),)
    assert span.at(0.5, 8) == ((0, 6),) and span.at(1.0, 8) == ((0, 6),)


@given(st.sets(st.integers(0, 40)))
def test_runs_hold_exactly_their_indices(indices: set[int]) -> None:
    found = runs(sorted(indices))
    assert [i for start, stop in found for i in range(start, stop)] == sorted(indices)
    assert all(a[1] < b[0] for a, b in pairwise(found)), "neighbours are one range"


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sets(st.integers(0, 24)), st.integers(0, 5), st.integers(0, 5)
)
def test_pieces_are_the_ranges_list_by_list(sizes: list[int], chosen: set[int], lead: int, back: int) -> None:
    total, offsets = sum(sizes), [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = cut(runs(sorted(i for i in chosen if i < total)), tuple(sizes), lead, back)
    covered = [offsets[p.site] + i for p in pieces for i in range(p.start, p.stop)]
    assert covered == [i for i in sorted(chosen) if lead <= i < total - back]
    assert all(p.stop <= sizes[p.site] for p in pieces)


def test_an_itinerary_learns_what_is_still_to_come() -> None:
    itinerary = Itinerary(RearThenFront(share=0.5, switch=0.5), (4,), 6)
    rear, front = Piece(0, 2, 4), Piece(0, 0, 2)
    assert itinerary.stages == [(rear,)] * 3 + [(front,)] * 3
    assert itinerary.later(Step(0, 6, 1.0)) == (front, rear) and itinerary.later(Step(3, 6, 0.5)) == (front,)
    assert itinerary.distinct() == [(rear,), (front,)]


def test_wrong_blocks_are_refused() -> None:
    for blocks in ((), (2, 1), (1, 1), (-1, 2)):
        with pytest.raises(RecipeError):
            parse(Span, {"kind": "chosen", "blocks": blocks}, "test")
    with pytest.raises(RecipeError, match="stop must be above start"):
        parse(Span, {"kind": "share", "start": 0.6, "stop": 0.4}, "test")
    assert Chosen(blocks=(7, 8)).at(0.0, 8) == ((7, 8),), "blocks that a network lacks are left away"
    assert BlockShare().remark and not Chosen(blocks=(1,)).remark
