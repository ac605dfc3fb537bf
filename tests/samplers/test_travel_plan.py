"""Which levels a time traveller evaluates."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.samplers.travel import TimeTravel


def test_a_plan_by_hand() -> None:
    assert TimeTravel(begin=0.25, end=0.75, back=2).plan(8) == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7]
    assert TimeTravel(begin=0.5, end=0.75, back=1, again=2).plan(4) == [0, 1, 2, 2, 2, 3]


@given(
    n=st.integers(1, 60), begin=st.floats(0, 0.9), width=st.floats(0.05, 1), back=st.integers(1, 6), again=st.integers(1, 4)
)
def test_every_plan_walks_all_levels_and_counts_what_it_costs(
    n: int, begin: float, width: float, back: int, again: int
) -> None:
    travel = TimeTravel(begin=begin, end=min(1.0, begin + width), back=back, again=again)
    plan = travel.plan(n)
    assert set(plan) == set(range(n)) and plan[0] == 0 and plan[-1] == n - 1
    jumps = [(a, b) for a, b in pairwise(plan) if b != a + 1]
    assert all(b == a + 1 - back for a, b in jumps)
    assert len(jumps) % again == 0 and len(plan) == n + back * len(jumps)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"name": "heun"}, "one of ddim, euler, dpm"), ({"begin": 0.5, "end": 0.5}, "above begin"), ({"name": "keep"}, "one of")],
)
def test_what_cannot_travel_says_so(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TimeTravel(**fields)
