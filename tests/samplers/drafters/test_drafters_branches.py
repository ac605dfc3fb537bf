"""Branches behind a run: what followed it in every text."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hasten.samplers.drafters.branches import PLACES, Branches, Node, Reading

STEPS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=1, max_size=6)), max_size=8)
"""Which of three texts grows, and by what."""


def expected(texts: list[list[int]], begins: list[int], run: tuple[int, ...], depth: int) -> dict[int, Any]:
    """The plain way: look at every place of every text behind what was given."""
    root = Node()
    for text, begin in zip(texts, begins, strict=True):
        for place in range(max(len(run), begin), len(text)):
            node = root
            for token in text[place : place + depth - len(run)] if tuple(text[place - len(run) : place]) == run else ():
                node = node.child(token)
                node.count += 1
    return counts(root)


def counts(node: Node | None) -> dict[int, Any]:
    return {} if node is None else {token: (child.count, counts(child)) for token, child in node.children.items()}


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(2, 5), st.lists(st.integers(0, 3), max_size=5))
def test_all_that_followed_is_counted(steps: list[tuple[int, list[int]]], depth: int, prompt: list[int]) -> None:
    branches = Branches(depth, 10_000)
    texts = [[*prompt], [], [*prompt, 1]]
    begins = [len(text) for text in texts]
    readings = [Reading(branches, length) for length in begins]
    for which, new in steps:
        texts[which] = texts[which] + new  # another list each time, as a caller may hand over
        readings[which].read(texts[which])
    assume(sum(map(len, texts)) <= PLACES)
    for length in range(1, depth):
        for run in itertools.product(range(4), repeat=length):
            assert counts(branches.after(list(run))) == expected(texts, begins, run, depth)


def test_of_frequent_runs_the_last_times_count() -> None:
    branches = Branches(3, 10_000)
    Reading(branches).read([1, 2] * PLACES + [1, 3] * (PLACES - 4))
    found = branches.after([1])
    assert found is not None and {token: child.count for token, child in found.children.items()} == {3: PLACES - 4, 2: 4}


def test_reading_again_counts_nothing_twice() -> None:
    branches, text = Branches(8, 100_000), [number % 5 for number in range(40)]
    reading = Reading(branches)
    reading.read(text)
    before = counts(branches.after([1]))
    reading.read(text)
    assert branches.size == 40 and counts(branches.after([1])) == before


def test_the_older_half_is_forgotten() -> None:
    branches = Branches(3, 40)
    old, long = Reading(branches), Reading(branches)
    old.read([1, 2, 3] * 5)
    long.read(list(range(10, 40)))
    assert branches.size <= 40 and branches.after([1]) is None and branches.after([12]) is None
    assert counts(branches.after([30])) == {31: (1, {32: (1, {})})}
    old.read([1, 2, 3] * 6)  # a text goes on although its beginning is forgotten
    assert counts(branches.after([1])) == {2: (1, {3: (1, {})})}
    for turn in range(20):
        Reading(branches).read([turn, 50, 51] * 4)
        assert branches.size <= 40
