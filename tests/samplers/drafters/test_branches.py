"""The trie of what occurred: a text that grows token by token is counted as if every run were looked up from the root."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.samplers.drafters.branches import Branches, Node, Reading

STEPS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=1, max_size=6)), max_size=12)
"""Which of three texts grows, and by what."""


def put(branches: Branches, text: list[int], begin: int) -> None:
    """The plain way: walk every run that ends at or behind `begin`."""
    for start in range(max(0, begin - branches.depth + 1), len(text)):
        node = branches.root
        for place in range(start, min(start + branches.depth, len(text))):
            node = node.child(text[place])
            if place >= begin:
                branches.size += node.count == 0
                node.count += 1
    if branches.size > branches.most:
        branches.squeeze()


def counts(node: Node) -> dict[int, Any]:
    return {token: (child.count, counts(child)) for token, child in node.children.items()}


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(1, 5), st.sampled_from([5, 20, 1000]), st.lists(st.integers(0, 3), max_size=7))
def test_texts_that_grow_are_counted_as_walks_from_the_root_count_them(
    steps: list[tuple[int, list[int]]], depth: int, most: int, prompt: list[int]
) -> None:
    fast, slow = Branches(depth, most), Branches(depth, most)
    texts = [[*prompt], [], [*prompt, 1]]
    known = [len(text) for text in texts]
    readings = [Reading(fast, length) for length in known]
    for which, new in steps:
        texts[which] += new
        readings[which].read(texts[which])
        put(slow, texts[which], known[which])
        known[which] = len(texts[which])
        assert counts(fast.root) == counts(slow.root)
        assert (fast.size, fast.squeezed) == (slow.size, slow.squeezed)


def test_a_new_token_costs_depth_steps() -> None:
    branches, text = Branches(8, 100_000), [number % 5 for number in range(40)]
    reading = Reading(branches)
    reading.read(text)
    whole = sum(_all(branches.root))
    for token in (3, 1, 4):
        text.append(token)
        reading.read(text)
    assert sum(_all(branches.root)) == whole + 3 * branches.depth
    reading.read(text)
    assert sum(_all(branches.root)) == whole + 3 * branches.depth, "nothing is counted twice"


def test_squeezing_keeps_what_is_frequent() -> None:
    branches = Branches(2, 40)
    Reading(branches).read([1, 2] * 20 + list(range(3, 45)))
    often, once = branches.after([1, 2]), branches.after([30, 31])
    assert branches.size <= 4 and often is not None and often.count > 5 and once is None


def _all(node: Node) -> list[float]:
    return [value for child in node.children.values() for value in (child.count, *_all(child))]
