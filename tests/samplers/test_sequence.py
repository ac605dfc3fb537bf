"""Shortest ways against all ways, local errors against steps taken, and a search that finds what is there."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import UsageError
from hasten.level import Level
from hasten.samplers.sequence import (
    Evolution,
    Recorded,
    _shortest,
    _shortest_of_pairs,
    best_sequence,
    local_errors,
    local_errors_2m,
)

Values = tuple[list[torch.Tensor], list[torch.Tensor]]


def recorded(N: int, seed: int = 0, *, flow: bool = True, size: int = 5) -> tuple[Recorded, Values]:
    """A run of random latents and data at falling levels."""
    g = torch.Generator().manual_seed(seed)
    shares = [1 - i / N for i in range(N)]
    angles = [u * math.pi / 2 * 0.99 for u in shares]
    levels = [Level(1 - u, u) if flow else Level(math.cos(a), math.sin(a)) for u, a in zip(shares, angles, strict=True)]
    x = [torch.randn(size, generator=g, dtype=torch.float64) for _ in range(N + 1)]
    D = [torch.randn(size, generator=g, dtype=torch.float64) for _ in range(N)]
    rows = torch.stack([*x, *D])
    return Recorded(levels, shares, rows @ rows.T, size), (x, D)


def left(run: Recorded, end: torch.Tensor, k: int) -> float:
    spread = float((end @ end / run.size).sqrt())
    level = run.levels[k] if k < run.steps else Level(1.0, 0.0)
    return spread / math.hypot(level.alpha * spread, level.sigma)


def stepped(run: Recorded, x: torch.Tensor, data: torch.Tensor, i: int, k: int) -> torch.Tensor:
    a, b = run.levels[i], run.levels[k] if k < run.steps else Level(1.0, 0.0)
    return b.sigma / a.sigma * x + (b.alpha - a.alpha * b.sigma / a.sigma) * data


@pytest.mark.parametrize("flow", [True, False])
def test_local_errors_are_those_of_steps(flow: bool) -> None:
    run, (x, D) = recorded(6, flow=flow)
    one, two = local_errors(run), local_errors_2m(run)
    for i, k in itertools.combinations(range(7), 2):
        expected = float((x[k] - stepped(run, x[i], D[i], i, k)).norm()) * left(run, x[6], k)
        assert float(one[i, k]) == pytest.approx(expected, rel=1e-9)
        for h in range(i):
            lam = [level.log_snr for level in run.levels]
            ahead = 0.0 if k == 6 else (lam[k] - lam[i]) / (2 * (lam[i] - lam[h]))
            data = D[i] + ahead * (D[i] - D[h])
            expected = float((x[k] - stepped(run, x[i], data, i, k)).norm()) * left(run, x[6], k)
            assert float(two[h, i, k]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert torch.isinf(one[3, :4]).all() and torch.isinf(two[2, :3]).all() and torch.isinf(two[1, 4, :5]).all()


@settings(max_examples=25, deadline=None)
@given(N=st.integers(1, 8), data=st.data(), seed=st.integers(0, 99))
def test_no_way_is_shorter(N: int, data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(1, N))
    g = torch.Generator().manual_seed(seed)
    one = torch.rand(N, N + 1, generator=g).masked_fill(torch.ones(N, N + 1).tril().bool(), float("inf"))
    two = torch.rand(N, N, N + 1, generator=g)
    for h, i, k in itertools.product(range(N), range(N), range(N + 1)):
        if not h < i < k:
            two[h, i, k] = float("inf")
    ways = [(0, *rest) for rest in itertools.combinations(range(1, N), n - 1)]

    def length(way: tuple[int, ...]) -> float:
        return sum(float(one[i, k]) for i, k in itertools.pairwise((*way, N)))

    def length2(way: tuple[int, ...]) -> float:
        stops = (*way, N)
        return float(one[0, stops[1]]) + sum(float(two[s]) for s in zip(stops, stops[1:], stops[2:], strict=False))

    assert length(_shortest(one, n)) == pytest.approx(min(map(length, ways)))
    assert length2(_shortest_of_pairs(one[0], two, n)) == pytest.approx(min(map(length2, ways)))


@pytest.mark.parametrize("order", [1, 2])
def test_a_path_that_bends_in_one_place_is_walked_there(order: int) -> None:
    """The data change from level 8 to level 12 of 30 and nowhere else: so there the levels are."""
    N = 30
    run, _ = recorded(N, size=2)
    data = [torch.tensor([min(1.0, max(0.0, (i - 8) / 4)), 1.0], dtype=torch.float64) for i in range(N)]
    x = [torch.tensor([0.3, -0.8], dtype=torch.float64)]
    for i in range(N):
        x.append(stepped(run, x[i], data[i], i, i + 1))
    rows = torch.stack([*x, *data])
    run.gram = rows @ rows.T
    found = best_sequence([run, run], 7, order=order)
    assert len(found) == 7 and found[0] == 0
    if order == 1:
        assert {9, 10, 11, 12} <= set(found), "nothing is lost between the other levels, wherever the rest stand"
    else:  # what it extrapolates there is nearly right
        assert sum(7 <= i <= 13 for i in found) >= 3


def test_sequences_that_cannot_be_say_so() -> None:
    run, _ = recorded(4)
    other, _ = recorded(5)
    for runs, n in (([run], 0), ([run], 5), ([], 1), ([run, other], 2)):
        with pytest.raises(UsageError, match="at least one run"):
            best_sequence(runs, n)
    with pytest.raises(UsageError, match="order must be 1 or 2"):
        best_sequence([run], 2, order=3)
    assert best_sequence([run], 1, order=2) == (0,) and best_sequence([run], 4) == (0, 1, 2, 3)


GOAL = (0, 3, 11, 17, 26)


def far(chosen: tuple[int, ...]) -> float:
    return sum(abs(a - b) for a, b in zip(chosen, GOAL, strict=True))


def test_evolution_finds_what_is_there_and_is_the_same_again() -> None:
    search = Evolution(trials=400, seed=3)
    found = search.search([(0, 6, 12, 18, 24)], 30, far, fixed=(0,))
    assert found.cost <= 2 < far((0, 6, 12, 18, 24)) and len(found.tried) <= 400
    assert all(len(one) == 5 and one[0] == 0 and list(one) == sorted(set(one)) for one in found.tried)
    assert search.search([(0, 6, 12, 18, 24)], 30, far, fixed=(0,)).tried == found.tried


def test_evolution_ends_where_nothing_is_left_to_try() -> None:
    found = Evolution(trials=50).search([(0, 1)], 2, lambda chosen: 1.0, fixed=(0,))
    assert list(found.tried) == [(0, 1)]
    few = Evolution(trials=500).search([(0, 1)], 3, lambda chosen: -chosen[1], fixed=(0,))
    assert few.best == (0, 2) and len(few.tried) == 2


@pytest.mark.parametrize("start", [[], [(1, 2)], [(0, 9)], [(0, 1), (0, 1, 2)]])
def test_starts_that_do_not_fit_say_so(start: Any) -> None:
    with pytest.raises(UsageError, match="starts of one size within 0 ... 3"):
        Evolution().search(start, 4, far, fixed=(0,))
