"""Goodput of drafters that know how sure they are: what is read of a proposal."""

from __future__ import annotations

import random

import pytest
import torch

from hasten.rounds import Round
from hasten.samplers.decode.pace import Goodput
from hasten.samplers.decode.pace_times import RUN
from hasten.samplers.decode.pace_weighed import WeighedState, grid
from hasten.samplers.decode.protocols import Context, Facts

FACTS = Facts(1, 9, torch.device("cpu"), False, lambda logits, *_: logits, weighs=True)
MOST = 8


class Play:
    """A drafter that is sure (`high`) in a share of the rounds and not in the others, on a model whose forward takes 1 second and
    `each` for each draft; drafting takes `drafting`. honest: what it says of its chances is true."""

    def __init__(self, share: float, each: float, high: float = 0.9, drafting: float = 0.05, honest: bool = True) -> None:
        self.share, self.each, self.high, self.drafting, self.honest = share, each, high, drafting, honest
        self.random = random.Random(0)
        found = Goodput().start(FACTS)
        assert isinstance(found, WeighedState)
        self.state = found
        self.read: list[tuple[bool, int]] = []
        self.seconds = self.tokens = 0.0

    def run(self, rounds: int) -> Play:
        for _ in range(rounds):
            self._round()
        return self

    def _round(self) -> None:
        asked = self.state.next(MOST)
        nodes = written = 0
        if asked:
            sure = self.random.random() < self.share
            chance = self.high if sure else 0.1
            nodes = self.state.weigh([[chance ** (rank + 1) for rank in range(MOST)]], context([99]))
            self.read.append((sure, nodes))
            true = chance if self.honest else 0.05
            while written < nodes and self.random.random() < true:
                written += 1
        ahead = 1 + written
        done = Round(asked, nodes, (nodes,), (ahead,), ahead=ahead, draft=self.drafting if asked else 0.0, verify=1 + self.each * nodes)
        self.state.learn(done)
        self.seconds, self.tokens = self.seconds + done.seconds, self.tokens + ahead


def context(room: list[int], active: list[bool] | None = None) -> Context:
    return Context([[1, 2] for _ in room], torch.zeros(len(room), dtype=torch.long), active or [True for _ in room], room)


def test_what_is_sure_is_read_and_what_is_not_is_left() -> None:
    play = Play(0.4, 0.1).run(400)
    late = play.read[-150:]
    assert len(play.read) > 300, "it is worth asking in nearly every round"
    assert all(nodes >= 4 for sure, nodes in late if sure) and all(nodes <= 1 for sure, nodes in late if not sure)
    assert play.seconds / play.tokens < 0.75, "of plain decoding's second for a token"


@pytest.mark.parametrize("share", [0.0, 0.02])
@pytest.mark.parametrize("drafting", [0.05, 0.5])
def test_drafts_that_never_pay_cost_next_to_nothing(share: float, drafting: float) -> None:
    play = Play(share, 0.4, drafting=drafting).run(1000)
    assert play.seconds / play.tokens < 1.03


@pytest.mark.parametrize("each", [0.1, 0.4])
def test_a_boaster_is_found_out(each: float) -> None:
    """Its chances say 0.9, and hardly anything stands."""
    play = Play(0.5, each, honest=False).run(1000)
    assert play.seconds / play.tokens < 1.05
    assert sum(nodes for _, nodes in play.read[-50:]) <= 50


def test_reading_that_costs_nothing_is_done() -> None:
    play = Play(0.0, 0.0, drafting=0.0).run(100)
    assert all(nodes for _, nodes in play.read[5:])


def test_the_batch_waits_for_its_slowest_row() -> None:
    """A draft of a row that is ahead of the others anyway gains nothing."""
    play = Play(0.5, 0.1).run(100)
    sure, unsure = [0.9**rank for rank in range(1, 9)], [0.05]
    assert play.state.weigh([sure, sure], context([50, 50])) >= 4
    assert play.state.weigh([sure, unsure], context([50, 50])) == 0
    assert play.state.weigh([sure, unsure], context([50, 40])) >= 4, "the second is ten tokens ahead"
    assert play.state.weigh([sure, unsure], context([50, 50], [True, False])) >= 4, "the second has ended"
    assert play.state.weigh([[], []], context([50, 50])) == 0


def test_it_waits_as_long_as_it_says() -> None:
    """Runs of rounds without drafts are as long as `quiet` says: until the next try, or as long again where none is allowed yet."""
    play = Play(0.0, 0.5).run(60)
    state, runs = play.state, []
    for _ in range(60):
        if state.next(MOST):
            assert state.idle >= state.wait
            play._round()
            continue
        runs.append(1 + state.quiet())
        waited, wait = state.idle, state.wait
        for number in range(runs[-1]):
            assert waited >= wait or number == 0 or state.next(MOST) == 0
            state.learn(Round(0, 0, (0,), (1,), verify=1.0))
    assert runs and all(1 <= each <= RUN for each in runs) and state.wait == state.LONGEST


def test_times_are_kept_under_powers_of_two() -> None:
    assert [grid(nodes) for nodes in (0, 1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 4, 4, 8, 8, 16]
