"""The answers of a cache benchmark, on rows made by hand: ties, missing peers, similarities nobody reaches."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hasten.pipelines.bench.bars import (
    Bar,
    Point,
    against_fewer_steps,
    against_oracle,
    against_peers,
    bars,
    best,
    curves,
    family,
    named_tolerance,
    oracle_name,
    psnr_at,
    speedup_at,
    tolerance,
    within,
)

CURVE = [Point(1.0, 60.0), Point(2.0, 40.0), Point(8.0, 20.0)]


def row(
    recipe: str, speedup: float | None, psnr: float | None, control: str | None = None, **more: Any
) -> dict[str, Any]:
    return {"recipe": recipe, "speedup": speedup, "psnr_median": psnr, "control": control, **more}


AUTO = [row("auto @ a", 2.0, 42.0), row("auto @ b", 4.0, 32.0)]


def test_a_point_itself_is_reached() -> None:
    assert speedup_at(CURVE, 40.0) == 2.0
    assert psnr_at(CURVE, 2.0) == 40.0


def test_between_points_dB_are_linear_in_the_logarithm_of_the_speedup() -> None:
    assert speedup_at(CURVE, 30.0) == pytest.approx(4.0)
    assert psnr_at(CURVE, 4.0) == pytest.approx(30.0)
    assert speedup_at(CURVE, 50.0) == pytest.approx(math.sqrt(2))


def test_nothing_is_extrapolated() -> None:
    assert speedup_at(CURVE, 61.0) is None
    assert speedup_at(CURVE, 10.0) == 8.0, "not faster than the fastest that was measured"
    assert psnr_at(CURVE, 9.0) is None
    assert psnr_at(CURVE, 0.5) == 60.0, "a slower run of the family need not be better than its best"
    assert speedup_at([], 30.0) is None and psnr_at([], 1.0) is None


def test_a_curve_that_turns_back_counts_by_its_best() -> None:
    turning = [Point(1.0, 50.0), Point(2.0, 30.0), Point(4.0, 45.0)]
    assert speedup_at(turning, 45.0) == 4.0
    assert psnr_at(turning, 2.0) == 45.0


def test_identical_outputs_reach_everything_but_are_no_slope() -> None:
    curve = [Point(1.1, math.inf), Point(4.0, 20.0)]
    assert speedup_at(curve, 40.0) == 1.1
    assert psnr_at(curve, 2.0) == 20.0
    assert psnr_at(curve, 1.1) == math.inf


def test_families_are_settings_of_one_method_and_rows_without_numbers_are_no_points() -> None:
    rows = [
        row("auto @ psnr=30", 3.0, 31.0),
        row("auto @ psnr=40", 2.0, 41.0),
        row("unipc 7 steps", 5.0, 30.0, "fewer_steps"),
        row("unipc 9 steps", 4.0, 33.0, "fewer_steps"),
        row("diffusers PAB @ 2", None, None, "peer:diffusers", n=0, note="crashed: TypeError: x"),
        row("diffusers TaylorSeer @ defaults", 0.98, None, "peer:diffusers", exact_match=True),
    ]
    assert [family(r) for r in rows] == [
        "auto",
        "auto",
        "unipc",
        "unipc",
        "diffusers PAB",
        "diffusers TaylorSeer",
    ]
    assert curves(rows) == {
        "auto": [Point(2.0, 41.0), Point(3.0, 31.0)],
        "unipc": [Point(4.0, 33.0), Point(5.0, 30.0)],
        "diffusers TaylorSeer": [Point(0.98, math.inf)],
    }


def test_of_equal_families_the_first_is_named() -> None:
    assert best({"a": CURVE, "b": CURVE}, lambda curve: speedup_at(curve, 40.0)) == ("a", 2.0)
    assert best({}, lambda curve: 1.0) is None


@pytest.mark.parametrize(("peer", "met"), [(2.0 / 1.15, True), (2.0 / 1.149, False)])
def test_the_bar_against_peers_is_at_its_number(peer: float, met: bool) -> None:
    bar = against_peers(
        [row("p @ 1", peer, 42.0, "peer:p"), row("q @ 1", 1.0, 90.0, "peer:q")], AUTO[:1], 42.0
    )
    assert bar.met is met and "p 1.74x" in bar.detail


def test_peers_are_compared_at_the_asked_similarity_only() -> None:
    fast_and_bad = row("p @ 9", 9.0, 29.9, "peer:p")
    bar = against_peers([fast_and_bad, row("q @ 1", 1.2, 45.0, "peer:q")], AUTO, 30.0)
    assert bar.met and "q 1.20x" in bar.detail and "ours 4.00x" in bar.detail


def test_missing_and_unreachable_are_told_apart() -> None:
    assert against_peers([], AUTO, 30.0).met is None
    assert against_peers([row("p", None, None, "peer:p", n=0)], AUTO, 30.0).verdict == "not measured"
    peers = [row("p @ 1", 3.0, 20.0, "peer:p")]
    assert against_peers(peers, [], 30.0).met is None
    assert against_peers(peers, AUTO, 30.0).verdict == "yes"
    assert "no peer reaches 30 dB" in against_peers(peers, AUTO, 30.0).detail
    never = against_peers(peers, AUTO, 50.0)
    assert never.verdict == "no" and "ours never reaches 50 dB; no peer reaches it either" in never.detail


def test_fewer_steps_are_compared_at_equal_time_and_the_least_lead_counts() -> None:
    control = [row("euler 9 steps", 2.0, 35.0, "fewer_steps"), row("euler 5 steps", 8.0, 25.0, "fewer_steps")]
    bar = against_fewer_steps(control, [*AUTO, row("auto @ c", 4.0, 31.5)])
    assert bar.met is False and "least lead 1.5 dB" in bar.detail
    assert against_fewer_steps(control, AUTO).met is True
    assert "least lead 2.0 dB" in against_fewer_steps(control, [row("auto", 4.0, 32.0)]).detail
    better = [*control, row("unipc 9 steps", 4.0, 36.0, "fewer_steps")]
    assert "unipc" in against_fewer_steps(better, AUTO).detail
    assert against_fewer_steps([], AUTO).met is None and against_fewer_steps(control, []).met is None
    assert against_fewer_steps(control, [row("auto", 20.0, 10.0)]).met is True, "no control is so fast"


def test_oracle_of_the_same_row() -> None:
    oracle = row("auto @ a, oracle schedule", 2.0, 46.0, "oracle")
    assert against_oracle([oracle], AUTO).met is True
    assert against_oracle([oracle | {"psnr_median": 47.0}], AUTO).met is False
    assert against_oracle([row("other, oracle schedule", 2.0, 99.0, "oracle")], AUTO).met is None
    both = row("auto @ a, oracle schedule", 2.0, None, "oracle", exact_match=True)
    assert against_oracle([both], [row("auto @ a", 1.0, None, exact_match=True)]).met is True
    assert against_oracle([both], AUTO).met is False, "a perfect schedule exists, ours is not it"


def test_tolerance_is_read_from_the_setting_and_held_by_single_runs() -> None:
    assert named_tolerance("auto @ budget.psnr=30, x=1") == ("psnr", 30.0)
    assert named_tolerance("auto @ latent_error=0.02") == ("latent_error", 0.02)
    assert named_tolerance("auto @ limit=3") is None and named_tolerance("auto") is None
    assert within({"psnr": None}, "psnr", 30) and not within({"psnr": 29.9}, "psnr", 30)
    assert within({"latent_error": 0.02}, "latent_error", 0.02) and not within(
        {"latent_error": None}, "latent_error", 1
    )
    mine = [row("auto @ psnr=30", 2.0, 33.0)]
    runs = [{"psnr": 31.0}] * 19 + [{"psnr": 29.0}]
    assert tolerance(mine, {"auto @ psnr=30": runs}).met is True
    assert tolerance(mine, {"auto @ psnr=30": runs[1:]}).met is False
    assert tolerance(mine, {}).met is None and tolerance(AUTO, {"auto @ a": runs}).met is None


def test_all_bars_of_one_family_of_ours() -> None:
    rows = [
        *AUTO,
        row("easycache", 9.0, 90.0),
        row("p @ 1", 1.5, 41.0, "peer:p"),
        row("euler 9 steps", 2.0, 35.0, "fewer_steps"),
        row("auto @ a, oracle schedule", 2.0, 43.0, "oracle"),
    ]
    found = bars(rows)
    assert [bar.verdict for bar in found] == ["yes", "yes", "yes", "yes", "yes", "not measured"]
    assert "ours 4.00x" in found[0].detail, "another preset of ours does not stand in for auto"
    assert all(bar.met is None for bar in bars(rows, "nothing"))
    assert Bar("b", None, "d").to_dict() == {"bar": "b", "met": None, "detail": "d"}


def test_oracles_are_a_family_of_their_own() -> None:
    mine = {"recipe": "auto @ psnr=30", "speedup": 3.0, "psnr_median": 40.0}
    oracle = {"recipe": oracle_name("auto @ psnr=30"), "control": "oracle", "speedup": 3.0, "psnr_median": 45.0}
    assert set(curves([mine, oracle])) == {"auto", "auto, oracle schedule"}
