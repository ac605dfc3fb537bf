"""Paces: how much is drafted follows what was accepted and what it costs."""

from __future__ import annotations

import itertools

import pytest
import torch

from hasten.rounds import Round
from hasten.samplers.decode.pace import Average, Goodput, GoodputState, Steady, Times, sizes
from hasten.samplers.decode.protocols import Facts, PaceState

FACTS = Facts(1, 9, torch.device("cpu"), False, lambda logits, *_: logits)
MOST = 8


def played(state: PaceState, rounds: int, chance: float, per_draft: float, base: float = 1.0) -> list[int]:
    """Sizes that a pace asks for where a draft of rank r stands if r <= chance * 8 and a forward takes base + per_draft * n."""
    asked = []
    for _ in range(rounds):
        nodes = state.next(MOST)
        right = min(nodes, round(chance * MOST))
        ranks = tuple(int(rank < right) for rank in range(nodes))
        state.learn(Round(nodes, nodes, (nodes,), (1 + right,), ranks, draft=0.01 if nodes else 0.0, verify=base + per_draft * nodes))
        asked.append(nodes)
    return asked


def drafted(state: PaceState, rounds: int, chance: float, each: float) -> tuple[float, int]:
    """Seconds and tokens of a drafter that is a network: every draft costs `each` of a forward of the model."""
    seconds, tokens = 0.0, 0
    for _ in range(rounds):
        nodes = state.next(MOST)
        right = min(nodes, round(chance * MOST))
        ranks = tuple(int(rank < right) for rank in range(nodes))
        done = Round(nodes, nodes, (nodes,), (1 + right,), ranks, draft=each * nodes, verify=1 + 0.02 * nodes)
        state.learn(done)
        seconds, tokens = seconds + done.seconds, tokens + 1 + right
    return seconds, tokens


def goodput() -> GoodputState:
    state = Goodput().start(FACTS)
    assert isinstance(state, GoodputState)
    return state


def test_drafts_that_stand_and_cost_nothing_are_all_made() -> None:
    assert played(goodput(), 60, 1.0, 0.0)[-20:] == [MOST] * 20


def test_drafts_that_never_stand_are_tried_ever_less() -> None:
    asked = played(goodput(), 400, 0.0, 0.1)
    tried = [at for at, nodes in enumerate(asked) if nodes]
    assert all(nodes == 0 for nodes in asked[-100:]) or len([at for at in tried if at >= 300]) <= 2
    lost = sum(0.1 * nodes + 0.01 for nodes in asked if nodes)
    assert lost / (400 + lost) < 0.03, "never below 0.97x of plain"


def test_a_dear_drafter_costs_little_before_it_is_given_up() -> None:
    """At 0.4 of a forward for every draft, eight at once would cost three forwards each time."""
    for rounds, chance, each in itertools.product((48, 200, 1000), (0.0, 0.125, 0.25), (0.05, 0.4, 0.9)):
        seconds, tokens = drafted(goodput(), rounds, chance, each)
        assert tokens / seconds > 0.94, (rounds, chance, each, "three tries in 48 rounds")
        assert rounds == 48 or tokens / seconds > 0.97, (rounds, chance, each)
    seconds, tokens = drafted(goodput(), 200, 0.5, 0.1)
    assert tokens / seconds > 3, "four stand, and cost half a forward: five tokens for 1.5"


def test_what_drafts_cost_is_bounded_whatever_they_seem_to_gain() -> None:
    """Of sixteen rows fifteen gain seven tokens of every draft, and all wait for the last, which gains none."""
    state = goodput()
    spent = lost = 0.0
    for number in range(600):
        nodes = state.next(MOST)
        right = (nodes,) * 15 + (0,)
        done = Round(
            nodes, nodes, (nodes,) * 16, tuple(1 + each for each in right), (15,) * nodes, ahead=1, draft=0.5 * nodes, verify=1 + 0.3 * nodes
        )
        state.learn(done)
        spent, lost = spent + done.seconds, lost + done.seconds - 1
        assert number < 100 or lost / spent < 0.05, number
    assert lost / spent < 0.03


def test_a_drafter_as_dear_as_many_forwards_is_hardly_tried() -> None:
    state = goodput()
    spent = 0.0
    for _ in range(200):
        nodes = state.next(MOST)
        done = Round(nodes, nodes, (nodes,), (1 + nodes,), (1,) * nodes, draft=15.0 if nodes else 0.0, verify=1)
        state.learn(done)
        spent += done.seconds
    assert spent < 200 + 15 + 0.03 * 200, "one try"


def test_a_slow_first_try_does_not_end_drafts_that_pay() -> None:
    state = goodput()
    for _ in range(60):
        nodes = state.next(MOST)
        draft = (2.5 if not state.drafted else 0.05) if nodes else 0.0
        state.learn(Round(nodes, nodes, (nodes,), (1 + nodes,), (1,) * nodes, draft=draft, verify=1 + 0.02 * nodes))
    assert state.next(MOST) == MOST


def test_a_time_that_is_known_of_one_size_grows_with_larger_ones() -> None:
    times = Times()
    assert times.of(3) == 0.0
    times.add(2, 0.5)
    assert (times.of(1), times.of(2), times.of(8)) == (0.5, 0.5, 2.0)
    times.add(4, 0.7)
    assert (times.of(3), times.of(8)) == (pytest.approx(0.6), pytest.approx(1.1))


def test_only_what_pays_is_drafted() -> None:
    asked = played(goodput(), 200, 0.25, 0.3)[-50:]
    assert asked.count(2) > 20 and sum(asked) / len(asked) < 4
    assert played(goodput(), 200, 0.25, 2.0)[-60:].count(0) > 50


def test_a_pace_that_had_given_up_comes_back() -> None:
    state = goodput()
    played(state, 100, 0.0, 0.05)
    assert played(state, 300, 1.0, 0.0)[-20:] == [MOST] * 20


def test_times_between_and_beyond_what_was_measured() -> None:
    state = goodput()
    for nodes in (0, 4):
        for _ in range(3):
            state.learn(Round(nodes, nodes, (nodes,), (1,), (0,) * nodes, verify=1 + 0.5 * nodes))
    assert [state.reading.of(nodes) for nodes in (0, 2, 4, 8)] == pytest.approx([1, 2, 3, 5])


def test_the_average_is_followed() -> None:
    state = Average(more=2).start(FACTS)
    assert state.next(MOST) == MOST
    assert played(state, 40, 0.25, 0.0)[-1] == 4 and played(state, 40, 0.0, 0.0)[-1] <= 3


def test_steady_is_steady() -> None:
    assert Steady().start(FACTS).next(5) == 5 and Steady(nodes=3).start(FACTS).next(2) == 2 and Steady(nodes=0).start(FACTS).next(9) == 0
    assert sizes(6) == [0, 1, 2, 4, 6] and sizes(1) == [0, 1] and sizes(8) == [0, 1, 2, 4, 8]
