from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hasten.caching.rules import Every, Listed, Schedule, Spread
from hasten.drift import Drift, Rule, cosine_distance, curvature, kl_divergence, relative_l1
from tests.contract import RuleContract, parts, seeded, steps


class TestEveryRule(RuleContract):
    @pytest.fixture(params=parts(Rule))
    def part(self, request: pytest.FixtureRequest) -> Rule:
        return request.param


def run(rule: Rule, total: int, change: float | None) -> list[bool]:
    state = rule.start()
    return [state.skip(step, change) for step in steps(total)]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 50])
@pytest.mark.parametrize(("warmup", "tail"), [(0.0, 0.0), (0.1, 0.02), (0.3, 0.25), (1.0, 0.0), (0.0, 1.0)])
def test_both_ends_are_computed(total: int, warmup: float, tail: float) -> None:
    skipped = run(Drift(limit=1.0, warmup=warmup, tail=tail), total, 0.0)
    head, end = max(1, math.ceil(warmup * total)), max(1, math.ceil(tail * total))
    assert not any(skipped[:head]) and not any(skipped[-end:])
    assert all(skipped[head : total - end])


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_skips_in_a_row_than_allowed(most: int) -> None:
    skipped = run(Drift(limit=1.0, max_skips=most), 60, 0.0)
    runs = "".join("s" if s else "c" for s in skipped).split("c")
    assert max(map(len, runs)) == most


def test_accumulated_changes_reach_the_limit() -> None:
    """0.04 + 0.04 is below 0.1, a third one is not: two skips, one computed step, and again."""
    skipped = run(Drift(limit=0.1, warmup=0.0), 13, 0.04)
    assert skipped == [False, *([True, True, False] * 3), True, True, False]


def test_single_changes_are_compared_when_not_accumulated() -> None:
    assert sum(run(Drift(limit=0.1, accumulate=False, warmup=0.0), 13, 0.04)) == 11
    assert sum(run(Drift(limit=0.1, accumulate=False), 13, 0.1)) == 0


def test_limit_zero_never_skips() -> None:
    assert not any(run(Drift(limit=0.0), 30, 0.0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=60), st.floats(0, 1))
def test_any_stream_of_changes_gives_a_sound_run(changes: list[float | None], limit: float) -> None:
    state = Drift(limit=limit, warmup=0.0, tail=0.0).start()
    total = 0.0
    for step, change in zip(steps(len(changes)), changes, strict=True):
        skip = state.skip(step, change)
        known = change is not None and math.isfinite(change)
        assert known or not skip
        total = total + (change or 0.0) if known else 0.0
        assert not skip or total < limit
        if not skip:
            total = 0.0


TOTALS = range(1, 101)


@pytest.mark.parametrize("share", [0.01, 0.16, 0.24, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("ends", [0.0, 1.0])
def test_spread_computes_its_share_at_every_length(share: float, ends: float) -> None:
    for total in [*range(1, 40), 50, 99, 100]:
        for times in ((), [step.time for step in steps(total)]):
            computed = Spread(share=share, ends=ends).computed(total, times)
            assert {0, total - 1} <= computed <= set(range(total))
            assert len(computed) == min(total, max(3, round(share * total)))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.floats(0.01, 1), st.floats(0, 1), st.floats(0.05, 4), st.booleans())
@example(100, 0.9, 0.5, 0.1, False)
@example(20, 0.5, 1.0, 4.0, True)
def test_spread_keeps_its_count_for_any_setting(
    total: int, share: float, ends: float, skew: float, by_time: bool
) -> None:
    times = [step.time for step in steps(total)] if by_time else ()
    computed = Spread(share=share, ends=ends, skew=skew).computed(total, times)
    assert 0 in computed and computed <= set(range(total))
    assert len(computed) == min(total, max(3, round(share * total)))


def test_spread_survives_times_that_repeat_or_stand_still() -> None:
    """Heun-type lists have every time twice; a host without noise levels may have only one."""
    for times in ([1.0, 0.8, 0.8, 0.6, 0.6, 0.2, 0.2], [0.5] * 7):
        computed = Spread(share=0.5).computed(7, times)
        assert 0 in computed and len(computed) == 4


def test_spread_over_time_is_even_in_time() -> None:
    """A shifted schedule takes half of its steps above 0.75; an even spread over time does not."""
    sigmas = [3 * s / (1 + 2 * s) for s in (1 - i / 50 for i in range(50))]
    by_time, by_step = (Spread(share=0.2, by=by).computed(50, sigmas) for by in ("time", "step"))
    gaps = [sigmas[a] - sigmas[b] for a, b in itertools.pairwise(sorted(by_time))]
    assert max(gaps) < 1.6 * min(gaps)
    assert sum(sigmas[i] > 0.75 for i in by_time) < sum(sigmas[i] > 0.75 for i in by_step)


def test_skew_moves_towards_the_start() -> None:
    means = [sum(Spread(share=0.2, skew=skew).computed(100)) for skew in (0.5, 1.0, 2.0)]
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize("interval", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_every_has_no_longer_gap(interval: int, warmup: int) -> None:
    for total in TOTALS:
        computed = sorted(Every(interval=interval, warmup=warmup).computed(total))
        assert computed[: min(warmup, total)] == list(range(min(warmup, total)))
        gaps = [b - a for a, b in itertools.pairwise(computed)]
        assert all(gap in (1, interval) for gap in gaps) and total - computed[-1] <= interval


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.lists(st.floats(-1, 2), min_size=1, max_size=20))
def test_listed_stays_in_range(total: int, at: list[float]) -> None:
    computed = Listed(at=tuple(at)).computed(total)
    assert 0 in computed and computed <= set(range(total))
    assert len(computed) <= len(at) + 1


def test_listed_means_shares_of_the_run() -> None:
    assert Listed(at=(0.0, 0.5, 1.0)).computed(11) == {0, 5, 10}
    assert Listed(at=(0.0, 0.5, 1.0)).computed(101) == {0, 50, 100}


def test_a_schedule_follows_a_changed_length() -> None:
    state = Every(interval=2).start()
    assert [state.skip(step, None) for step in steps(4)] == [False, True, False, True]
    assert [state.skip(step, None) for step in steps(3)] == [False, True, False]
    assert isinstance(Every(), Schedule)


def test_metrics_against_hand_numbers() -> None:
    old, new = torch.tensor([1.0, -3.0]), torch.tensor([2.0, -2.0])
    assert float(relative_l1(new, old)) == pytest.approx(0.5)
    assert float(cosine_distance(new, old)) == pytest.approx(1 - 8 / math.sqrt(8 * 10))
    assert float(cosine_distance(old, -old)) == pytest.approx(2.0)
    assert float(curvature(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.0]))) == 0.5
    p, q = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 0.5]])
    hand = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(hand, rel=1e-5)


@pytest.mark.parametrize("metric", [relative_l1, cosine_distance, kl_divergence])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_metrics_of_what_is_not_finite_are_not_a_small_number(metric: object, bad: float) -> None:
    broken = seeded(0, 4, 8)
    broken[1, 2] = bad
    assert callable(metric)
    for new, old in ((broken, seeded(1, 4, 8)), (seeded(1, 4, 8), broken)):
        if metric is relative_l1 and bad == math.inf and old is broken:
            continue  # inf / inf is NaN, finite / inf would be 0: covered by the next test
        assert not math.isfinite(float(metric(new, old)))


def test_a_finite_value_after_an_infinite_one_is_no_small_change() -> None:
    old = seeded(0, 4, 8)
    old[0, 0] = math.inf
    assert not math.isfinite(float(relative_l1(seeded(1, 4, 8), old)))


def test_listed_with_a_share_keeps_its_speed_at_another_number_of_steps() -> None:
    at = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
    assert Listed(at=at, share=0.12).computed(50) == Listed(at=at).computed(50), "six of fifty are the list itself"
    for total in (6, 12, 20, 28, 100):
        found = Listed(at=at, share=0.3).computed(total)
        assert len(found) == min(total, max(3, round(0.3 * total))) and 0 in found and max(found) < total
    few = sorted(Listed(at=at, share=0.15).computed(20))
    assert few == [0, 7, 17], "first, middle and last of the listed way"
