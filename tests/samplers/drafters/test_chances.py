"""Chances that are corrected by what became of them, and trees of which the best nodes are kept."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.samplers.decode.protocols import Context, Facts
from hasten.samplers.drafters.chances import EDGES, Chances
from hasten.samplers.drafters.contexts import MOST, Contexts
from hasten.samplers.drafters.host_tree import HostTree, joined
from hasten.samplers.drafters.look_up import LookUp


def test_nothing_seen_nothing_changed() -> None:
    assert [Chances().of(each) for each in (0.0, 0.33, 1.0)] == [0.0, 0.33, 1.0]


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_they_come_near_the_truth_and_stay_chances(stated: float, true: float, seed: int) -> None:
    rng, chances = random.Random(seed), Chances()
    for _ in range(600):
        chances.learn(stated, rng.random() < true)
    assert 0 <= chances.of(stated) <= 1
    assert abs(chances.of(stated) - true) < 0.15
    other = next(each for each in (0.02, 0.55, 1.0) if sum(edge <= each for edge in EDGES) != sum(edge <= stated for edge in EDGES))
    assert chances.of(other) == other, "each bin learns for itself"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9), st.floats(0, 1)), max_size=20), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_the_best_nodes_of_a_tree_are_a_tree(steps: list[tuple[int, int, float]], nodes: int) -> None:
    tree = HostTree(20, 6)
    for at, token, chance in steps:
        tree.child(at % len(tree.tokens), token, chance)
    best = tree.best(nodes)
    assert sorted(best.score[1:], reverse=True) == sorted(tree.score[1:], reverse=True)[:nodes]
    if len(best.tokens) > 1:
        joined([best], torch.tensor([0]), ("x",)).check(10)
    paths = {_path(tree, node): tree.score[node] for node in range(len(tree.tokens))}
    assert all(paths[_path(best, node)] == best.score[node] for node in range(len(best.tokens)))


def _path(tree: HostTree, node: int) -> tuple[int, ...]:
    return () if node == 0 else (*_path(tree, tree.parent[node]), tree.tokens[node])


def test_a_tree_learns_from_the_text_whether_it_was_read_or_not() -> None:
    """Of each node whose parent was written, and of no other."""
    chances = Chances(trust=1.0)
    tree = HostTree(9, 9, chances)
    first, other = tree.child(0, 5, 0.95), tree.child(0, 6, 0.15)
    tree.child(first, 7, 0.55)
    tree.child(other, 7, 0.75)
    tree.learn([5, 8, 9])
    assert chances.of(0.95) > 0.95 and chances.of(0.15) < 0.1 and chances.of(0.55) < 0.3 and chances.of(0.75) == 0.75


def test_proposals_are_weighed_and_learn_although_nothing_is_read() -> None:
    kept: dict[str, object] = {}
    facts = Facts(1, 50, torch.device("cpu"), False, lambda logits, *_: logits, kept=kept, weighs=True)
    state, text = LookUp().start(facts), [1, 2, 3, 4, 1, 2]
    told: list[list[list[float]]] = []

    def weigh(chances: list[list[float]], context: Context) -> int:
        told.append(chances)
        return 0

    for token in (9, 1, 2, 9, 1, 2, 9):
        found = state.propose(Context([text], torch.tensor(text[-1:]), [True], [99], weigh=weigh), 4)
        assert found.size == 1
        text.append(token)
    assert all(row == sorted(row, reverse=True) and len(row) <= 4 for (row,) in told) and told[0][0][0] > 0.5
    (chances,) = kept.values()
    assert isinstance(chances, Chances) and sum(chances.seen) > 0


def test_where_nothing_stood_before_the_text_says_what_it_is_made_of() -> None:
    contexts = Contexts(0, 3)
    contexts.read([7, 8, 7, 9, 7, 5])
    guesses = contexts.after([40, 41, 42], 3)
    assert guesses[0][0] == 7 and len(guesses) == 3 and all(0 < chance < 0.6 for _, chance in guesses)
    contexts.read([7, 8, 7, 9, 7, 5, *range(100, 200)])
    assert len(contexts.seen[()]) == MOST
