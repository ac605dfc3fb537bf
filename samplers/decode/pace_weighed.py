"""Goodput for drafters that know how sure they are: what is read is decided when the drafts are known."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

from hasten.rounds import Round
from hasten.samplers.decode.pace_times import RUN, Times, sizes
from hasten.samplers.decode.protocols import Context, PaceState

if TYPE_CHECKING:
    from hasten.samplers.decode.pace import Goodput


class WeighedState(PaceState):
    """The state of `Goodput` where drafts are cheap and come with the chance that they stand.

    Of every proposal so many drafts are read, none included, as write most tokens per second: one token, and the chances of
    those that are read, over the time of reading them. What was left unread costs nothing but its drafting, and the drafter
    learns from it all the same. So long as that has paid of late (`worth`, seconds of a round, a moving average), drafts are
    asked for in every round; else in one of `Goodput.probe`, and ever fewer while that gains nothing. Once drafts have lost more than `Goodput.loss` of all time, they are asked
    for only where it is no luck that they have paid.

    reading: seconds of the model's forward with the verdict and the commit, by drafts; drafting: of proposing. spent: of all rounds;
    lost: what rounds with drafts took longer than plain ones would have for as much. square: the same average as `worth`, of its
    square. hoped, gained: tokens that drafts were to bring the row nearer that the batch waits for, and those that they did, fading sums.
    """

    WARM = 2
    """Rounds without drafts at the start, for their time; the first of them is slower than others and not counted."""
    FREE = 2
    """Plain rounds that may be lost before there is time to lose a share of."""
    LONGEST = 16
    """Rounds between two tries, at most."""
    LATE, FADE = 0.1, 0.98
    TRUST = 4.0
    """Tokens with which `hoped` and `gained` begin, so that the first rounds do not decide alone."""

    def __init__(self, pace: Goodput) -> None:
        self.pace = pace
        self.reading, self.drafting = Times(), Times()
        self.rounds = self.idle = self.drafted = 0
        self.spent = self.lost = self.worth = self.square = 0.0
        self.hoped = self.gained = self.TRUST
        self.hope = 0.0
        self.wait = pace.probe

    def next(self, most: int) -> int:
        if most == 0 or self.rounds < self.WARM:
            return 0
        if self.lost > self.pace.loss * self.spent + self.FREE * self.reading.of(0):
            return most if self.worth > self._doubt() else 0
        return most if self.worth >= 0 or self.idle >= self.wait else 0

    def _doubt(self) -> float:
        """Standard error of `worth`: so much may be luck."""
        return math.sqrt(self.LATE / (2 - self.LATE) * max(0.0, self.square - self.worth**2))

    def quiet(self) -> int:
        if self.rounds < self.WARM:
            return self.WARM - self.rounds - 1
        waiting = self.wait - self.idle
        return (min(RUN, waiting) if waiting > 0 else RUN) - 1

    def weigh(self, chances: list[list[float]], context: Context) -> int:
        sums = [[0.0, *accumulate(each)] for each in chances]
        behind = [context.reach + 1 - room for room in context.room]  # by how much a row has less before it than the last one
        drafting = self.drafting.of(1)

        def ahead(nodes: int) -> float:
            """Tokens that drafts bring the row nearer that the batch waits for."""
            return min(less + each[min(nodes, len(each) - 1)] for less, each, on in zip(behind, sums, context.active, strict=True) if on)

        def rate(nodes: int) -> float:
            return (1 + self.gained / self.hoped * ahead(nodes)) / max(drafting + self.reading.of(nodes), 1e-9)

        best = max(sizes(max(map(len, chances))), key=rate)
        self.hope = ahead(best)
        return best

    def learn(self, done: Round) -> None:
        self.rounds += 1
        self.spent += done.seconds
        first = done.nodes > 0 and not self.drafted  # slower than others, as the first of all is
        if self.rounds > 1 and not first:
            self.reading.add(grid(done.nodes), done.verify + done.commit)
        self.idle = 0 if done.asked else self.idle + 1
        if not done.asked:
            return
        self.drafting.add(1, done.draft)
        ahead = done.ahead or 1
        if done.nodes:
            self.drafted += 1
            self.hoped, self.gained = self.FADE * self.hoped + self.hope, self.FADE * self.gained + ahead - 1
        if first:
            return
        read = self.reading.of(grid(done.nodes)) if done.nodes else done.verify + done.commit
        net = ahead * self.reading.of(0) - read - done.draft
        self.wait = self.pace.probe if net > 0 else min(2 * self.wait, self.LONGEST)
        self.lost -= net
        self.worth += self.LATE * (net - self.worth)
        self.square += self.LATE * (net**2 - self.square)


def grid(nodes: int) -> int:
    """The next power of two, under which the time of so many drafts is kept."""
    return 1 << (nodes - 1).bit_length() if nodes else 0
