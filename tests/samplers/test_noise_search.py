"""Which noises a search asks for, and what it says it costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import UsageError
from hasten.samplers.noise_search import NearbyNoises, NoiseSearch, Paths, Proposal, RandomNoises, Rounds

KINDS = [RandomNoises, NearbyNoises, Paths]


def asked(policy: Rounds, scores: dict[int, float], seed: int = 5) -> list[list[Proposal]]:
    """All that a search asks for, its seeds scoring as told (0 where nothing is)."""
    state, rounds = policy.start(seed), []
    while proposals := state.ask():
        rounds.append(proposals)
        state.tell([scores.get(proposal.seed, 0.0) for proposal in proposals])
    return rounds


def test_random_noises_are_the_seeds_that_follow() -> None:
    assert asked(RandomNoises(count=3), {}) == [[Proposal(5), Proposal(6), Proposal(7)]]


def test_zero_order_goes_to_the_best_neighbour() -> None:
    found = asked(NearbyNoises(neighbours=2, rounds=3, radius=0.4), {7: 1.0, 9: 0.5})
    assert found[0] == [Proposal(5)]
    assert found[1] == [Proposal(6, 0, 0.4), Proposal(7, 0, 0.4)]
    assert found[2] == [Proposal(8, 2, 0.4), Proposal(9, 2, 0.4)], "seed 7 is candidate 2"
    assert found[3] == [Proposal(10, 2, 0.4), Proposal(11, 2, 0.4)], "nothing near it was better"
    assert len(found) == 4


@given(n=st.integers(1, 60), count=st.integers(1, 20), neighbours=st.integers(1, 5), rounds=st.integers(1, 5))
def test_a_search_costs_what_it_says(n: int, count: int, neighbours: int, rounds: int) -> None:
    for policy in (RandomNoises(count=count), NearbyNoises(neighbours=neighbours, rounds=rounds)):
        assert sum(map(len, asked(policy, {}))) * n == policy.evaluations(n)


@given(n=st.integers(1, 40), budget=st.integers(1, 600))
def test_budgets_hold(n: int, budget: int) -> None:
    for kind in KINDS:
        try:
            made = kind.within(budget, n)
        except UsageError as error:
            assert "budget of" in str(error)
            continue
        assert made.evaluations(n) <= budget
        if kind is RandomNoises:
            assert made.evaluations(n) + n > budget


@given(n=st.integers(2, 50), paths=st.integers(1, 4), branches=st.integers(2, 4), back=st.integers(1, 5), ahead=st.integers(1, 5))
def test_paths_are_looked_at_within_the_run(n: int, paths: int, branches: int, back: int, ahead: int) -> None:
    policy = Paths(paths=paths, branches=branches, back=back, ahead=ahead)
    looks = policy.looks(n)
    assert all(back <= level and level + ahead < n for level in looks)
    walked = looks[0] if looks else n
    total = paths * walked + sum(paths * branches * (back + ahead + 1) for _ in looks)
    total += paths * (n - (looks[-1] + ahead)) if looks else 0
    assert total == policy.evaluations(n)


def test_nothing_to_choose_from_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to choose from"):
        Paths(paths=1, branches=1)
    assert set(NoiseSearch.members()) == {"random", "zero-order", "paths"}
