"""One tolerance, several levels: what one has spent the others do not have, and numbers are read together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.account import LEAST, Account, LeftOut, effect
from hasten.ledger import Ledger
from tests.hasten.test_ledger import flow


class Fixed:
    """A level that has spent so much."""

    def __init__(self, level: str, square: float) -> None:
        self.level, self.square = level, square


@given(squares=st.lists(st.floats(0, 0.1), min_size=1, max_size=5))
def test_squares_add_up_and_nobody_counts_himself(squares: list[float]) -> None:
    account, names = Account(0.1), ("reuse", "guidance", "attention")
    members = [Fixed(names[number % 3], square) for number, square in enumerate(squares)]
    for member in members:
        account.join(member)
    assert account.estimate**2 == pytest.approx(sum(squares), abs=1e-12)
    assert sum(error**2 for error in account.by_level.values()) == pytest.approx(sum(squares), abs=1e-12)
    assert account.others(members[0]) == pytest.approx(sum(squares[1:]), abs=1e-12)
    assert account.levels == len({member.level for member in members})
    assert account.tolerance * math.sqrt(LEAST) <= account.open_to(members[0]) <= account.tolerance


def test_alone_there_is_the_whole_tolerance_to_the_last_bit() -> None:
    for tolerance in (0.0123, 0.05, 0.1259254117):
        rule = Ledger(tolerance=tolerance)
        state = rule.start()
        assert state.account.open_to(state) == tolerance and state.account.per_gap(state, 0.0, 1.0) == math.sqrt(tolerance**2)


def computed(tolerance: float, others: float) -> int:
    """Steps that a ledger computes of 50 while another level has spent `others` of its tolerance (in errors)."""
    steps = flow(50)
    state = Ledger(tolerance=tolerance).start([step.time for step in steps])
    account = Account(tolerance)
    account.join(Fixed("guidance", others**2))
    state.share(account)
    count, node = 0, None
    for step in steps:
        assert step.level is not None
        if not state.skip(step, None):
            count += 1
            state.learn(step, None if node is None else 1.0 * abs(step.level.angle - node))
            node = step.level.angle
    return count


@settings(max_examples=20, deadline=None)
@given(tolerance=st.floats(0.01, 0.3))
def test_what_guidance_has_spent_reuse_computes_for(tolerance: float) -> None:
    counts = [computed(tolerance, share * tolerance) for share in (0.0, 0.7, 0.95)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_numbers_are_read_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    account, told = Account(0.1), []
    for value in (1.0, 2.0, 3.0):
        account.ask(torch.tensor(value), told.append)
    account.read()
    account.read()
    assert told == [1.0, 2.0, 3.0] and len(reads) == 1


def test_what_is_asked_for_while_numbers_are_told_waits() -> None:
    account, told = Account(0.1), []

    def first(value: float) -> None:
        told.append(value)
        account.ask(torch.tensor(9.0), told.append)

    account.ask(torch.tensor(1.0), first)
    account.read()
    assert told == [1.0]
    account.read()
    assert told == [1.0, 9.0]


def test_a_share_left_out_counts_until_the_next_evaluation() -> None:
    steps = flow(6)
    times = [step.time for step in steps]
    member, shares = LeftOut("attention"), {0: 0.1, 3: 0.3, 4: 0.0}
    for step in steps:
        member.passed(step, times, evaluated=step.index in shares)
        if step.index in shares:
            member.told(shares[step.index])
    effects = [effect(step, times) for step in steps]
    assert member.square == pytest.approx((0.1 * sum(effects[:3]) + 0.3 * effects[3]) ** 2)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_share_that_is_no_number_counts_as_all(broken: Any) -> None:
    step, member = flow(4)[0], LeftOut("attention")
    member.passed(step, [step.time], evaluated=True)
    member.told(broken)
    assert member.square == pytest.approx(effect(step, [step.time]) ** 2) and member.square > 0


@given(tolerance=st.floats(0.01, 0.3), mine=st.floats(0, 0.3), other=st.floats(0, 0.3))
def test_what_a_level_may_have_at_the_end_is_within_the_tolerance(tolerance: float, mine: float, other: float) -> None:
    """Its part of what is left; where everything is spent hardly more than it has."""
    account, members = Account(tolerance), [Fixed("attention", mine**2), Fixed("reuse", other**2)]
    for member in members:
        account.join(member)
    most = account.until_end(members[0])
    assert most >= mine
    left = max(tolerance**2 - mine**2 - other**2, LEAST * tolerance**2)
    assert most**2 - mine**2 == pytest.approx(left / 2, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("spent", [0.0, 0.06])
def test_what_is_affordable_at_every_step_ends_at_the_tolerance(spent: float) -> None:
    """A level that leaves out all it may ends where the account lets it, however many steps were dense before."""
    steps, tolerance = flow(20), 0.1
    times = [step.time for step in steps]
    account, member = Account(tolerance), LeftOut("attention")
    account.join(member)
    if spent:
        account.join(Fixed("attention", spent**2))
    share = 0.0
    for step in steps:
        member.passed(step, times, evaluated=True)
        member.told(share if step.index > 4 else 0.0)
        share = member.affordable(account, step, times)
        assert 0 < share <= 1
    assert account.estimate == pytest.approx(tolerance, rel=0.05)


def test_a_level_that_shares_is_offered_less() -> None:
    steps = flow(10)
    times = [step.time for step in steps]
    alone, shared, member = Account(0.1), Account(0.1), LeftOut("attention")
    alone.join(member)
    shared.join(member)
    shared.join(Fixed("reuse", 0.0))
    assert member.affordable(shared, steps[0], times) == pytest.approx(member.affordable(alone, steps[0], times) / math.sqrt(2))
