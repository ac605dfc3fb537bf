"""Guidance by a ledger: u is left out where the measured error of its forecast is affordable, and only there."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.account import Account
from hasten.samplers.guidance_ledger import LedgerGuidance, LedgerGuidanceState
from hasten.step import Step
from tests.hasten.test_ledger import flow


class Run:
    """A run whose difference d moves by `roughness` a step in a random direction, besides along a line in time."""

    def __init__(self, policy: LedgerGuidance, roughness: float, total: int = 20, scale: float = 3.0, broken: int = -1) -> None:
        self.state: LedgerGuidanceState = policy.start()
        self.state.scale = scale
        steps = flow(total)
        self.state.share(Account(policy.tolerance), [step.time for step in steps])
        noise = torch.Generator().manual_seed(0)
        line, d = torch.randn(2, 4, 9, generator=noise), torch.zeros(2, 4, 9)
        self.known: list[int] = []
        self.error = 0.0
        for step in steps:
            d = d + roughness * torch.randn(2, 4, 9, generator=noise)
            self.take(step, d + line * step.time if step.index != broken else torch.full_like(d, math.nan))
        self.state.account.read()

    def take(self, step: Step, d: Tensor) -> None:
        c = torch.ones_like(d)
        if self.state.needs(step):
            self.known.append(step.index)
            self.state.observe(step, c, c - d)
        else:
            answer = self.state.estimate(step, c)
            assert answer.shape == c.shape and bool(torch.isfinite(answer).all()), "what is not a number never stands in"


LINE = LedgerGuidance(tolerance=0.1, after=0.2)


def test_a_smooth_difference_is_left_out_and_a_rough_one_is_not() -> None:
    counts = [len(Run(LINE, roughness).known) for roughness in (0.0, 0.02, 3.0)]
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[2] == 20


def test_a_smaller_tolerance_and_a_larger_scale_know_more() -> None:
    by_tolerance = [len(Run(LedgerGuidance(tolerance=tolerance), 0.02).known) for tolerance in (0.5, 0.05, 0.005)]
    by_scale = [len(Run(LINE, 0.02, scale=scale).known) for scale in (1.1, 3.0, 30.0)]
    assert by_tolerance == sorted(by_tolerance) and by_tolerance[0] < by_tolerance[-1]
    assert by_scale == sorted(by_scale) and by_scale[0] < by_scale[-1]


def test_nothing_is_left_out_before_its_share_of_the_run() -> None:
    known = Run(LedgerGuidance(tolerance=1.0, after=0.5), 0.0).known
    assert set(range(10)) <= set(known) and len(known) < 20
    assert len(Run(LedgerGuidance(tolerance=1.0, after=1.0), 0.0).known) == 20


@settings(max_examples=30, deadline=None)
@given(tolerance=st.floats(0.01, 0.5), roughness=st.floats(0.0, 1.0), total=st.integers(3, 40))
def test_what_it_estimates_stays_within_reach_of_the_tolerance(tolerance: float, roughness: float, total: int) -> None:
    run = Run(LedgerGuidance(tolerance=tolerance, after=0.0), roughness, total)
    assert run.known[:2] == [0, 1], "an error must have been measured"
    assert math.isfinite(run.state.square) and math.sqrt(run.state.square) <= 2 * tolerance


def test_what_others_have_spent_is_not_there() -> None:
    class Other:
        level, square = "reuse", 0.1**2

    free, run = len(Run(LINE, 0.02).known), Run(LINE, 0.0, total=1)
    spent, state = Account(LINE.tolerance), LINE.start()
    spent.join(Other())
    steps = flow(20)
    state.share(spent, [step.time for step in steps])
    run.state, run.known, d = state, [], torch.zeros(2, 4, 9)
    noise = torch.Generator().manual_seed(0)
    line = torch.randn(2, 4, 9, generator=noise)
    for step in steps:
        d = d + 0.02 * torch.randn(2, 4, 9, generator=noise)
        run.take(step, d + line * step.time)
    assert len(run.known) > free


def test_what_is_not_a_number_is_forgotten() -> None:
    run = Run(LedgerGuidance(tolerance=1.0, after=0.0), 0.0, broken=1)
    assert set(range(4)) <= set(run.known) and len(run.known) < 20


def test_a_predicted_variance_does_not_count() -> None:
    state, steps = LedgerGuidance().start(), flow(10)
    state.channels = 4
    for step in steps[:3]:
        d = torch.ones(1, 8, 3)
        d[:, 4:] = 1000.0 * step.index**2
        assert state.needs(step)
        state.observe(step, d, torch.zeros_like(d))
    state.account.read()
    assert state.rho is not None and state.rho < 1e-3


def test_a_stand_in_counts_until_the_next_evaluation() -> None:
    """Forecasts of whole steps are made from it, so a step that is skipped after it carries its error on."""
    steps = flow(10)
    spent = []
    for following in (4, 7):
        state = LedgerGuidance(tolerance=1.0, after=0.0).start()
        state.share(Account(1.0), [step.time for step in steps])
        for number in range(3):
            state.observe(steps[number], torch.full((1, 2, 2), 0.001 * number**2), torch.zeros(1, 2, 2))
        assert not state.needs(steps[3])
        state.observe(steps[following], torch.ones(1, 2, 2), torch.zeros(1, 2, 2))
        walked = state.gap if state.gap else None
        assert walked is None, "the gap is closed"
        asked = state.account._asked[-1][1]
        spent.append(asked.args[1][0][0])  # type: ignore[attr-defined]  # the effect of its one stand-in
    angles = [step.level.angle for step in steps if step.level is not None]
    assert spent[1] / spent[0] == pytest.approx((angles[3] - angles[7]) / (angles[3] - angles[4]))
