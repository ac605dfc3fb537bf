"""How many tokens are drafted next: budget controllers."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from hasten.rounds import Round
from hasten.samplers.decode.pace_times import RUN, Times, sizes
from hasten.samplers.decode.pace_weighed import WeighedState
from hasten.samplers.decode.protocols import Facts, Pace, PaceState


class Steady(Pace):
    """Always the same number. nodes None: as many as the drafter makes."""

    kind: ClassVar[str] = "steady"
    nodes: int | None = Field(None, ge=0)

    def start(self, facts: Facts) -> PaceState:
        return _SteadyState(self)


class _SteadyState(PaceState):
    def __init__(self, pace: Steady) -> None:
        self.pace = pace

    def next(self, most: int) -> int:
        return most if self.pace.nodes is None else min(most, self.pace.nodes)

    def quiet(self) -> int:
        return RUN - 1 if self.pace.nodes == 0 else 0


class Average(Pace):
    """`more` than a moving average of what was accepted; all of it for a start (the adaptive length of DiffuSpec, arXiv
    2510.02358). share: of the last round in the average."""

    kind: ClassVar[str] = "average"
    share: float = Field(0.3, gt=0, le=1)
    more: int = Field(2, ge=1)

    def start(self, facts: Facts) -> PaceState:
        return _AverageState(self)


class _AverageState(PaceState):
    def __init__(self, pace: Average) -> None:
        self.pace = pace
        self.accepted: float | None = None

    def next(self, most: int) -> int:
        return most if self.accepted is None else min(most, math.ceil(self.accepted) + self.pace.more)

    def learn(self, done: Round) -> None:
        drafted = [(written - 1) for nodes, written in zip(done.drafted, done.written, strict=True) if nodes]
        if drafted:
            last = sum(drafted) / len(drafted)
            before = last if self.accepted is None else self.accepted
            self.accepted = before + self.pace.share * (last - before)


class Goodput(Pace):
    """The number that writes most tokens per second (SmartSpec, arXiv 2406.14066), none at all included.

    Expected tokens of a round with n drafts: one, and for each rank up to n how often the draft of this rank was accepted,
    a moving average over some `memory` rounds. Its time is measured on this machine, of the drafter and of the model: the median
    of the last rounds of each size, and a line through them for sizes that were not tried. The first drafts are `FIRST`, for a
    drafter that is a network may cost more than the model. Where no draft pays, one round in `probe` tries again, and
    ever fewer (twice as many rounds in between, up to `rare`) while it keeps failing. Where nearly all drafts of a round stood,
    twice as many are tried, because nothing is known of ranks that were given up; ever more seldom, too, while that gains nothing.
    Whatever the estimates say, what drafts have cost more than they gained stays within `loss` of all the time (and `FREE` plain
    rounds): beyond that nothing is drafted.

    Rows of a batch wait for the slowest of them: a round gains what brings the row nearer that has most before it.

    Drafters that look into texts say how sure they are of each draft, and cost little. With them it is decided when the drafts are
    known how many of them are read (`WeighedState`).

    Differs: SmartSpec fits its times offline, assumes one acceptance rate for all positions, and serves rows that do not wait for
    each other.
    """

    kind: ClassVar[str] = "goodput"
    memory: int = Field(20, ge=1)
    probe: int = Field(8, ge=2)
    rare: int = Field(128, ge=2)
    loss: float = Field(0.02, ge=0)

    def start(self, facts: Facts) -> PaceState:
        return WeighedState(self) if facts.weighs else GoodputState(self)


class GoodputState(PaceState):
    """The state of `Goodput`.

    ranks: for each rank from 1, how often the draft of this rank was accepted. reading: seconds of the model's forward with
    the verdict and the commit; drafting: of proposing. more: drafts that one of the next rounds should have at least, because the
    last ones stood. spent: seconds of all rounds; lost: of these, what rounds with drafts took longer than plain ones would have
    for as much. mean, slowest: accepted drafts of the mean row and of the one that the batch waits for, fading sums. patience: for each number that was tried so, how many rounds go by until it is again; again: the round then.
    """

    WARM = 2
    """Rounds without drafts at the start, for their time; the first of them is slower than others and not counted."""

    FIRST = 1
    """Drafts of the first round that has any. It is not counted as lost: first times are slower than others."""

    FREE = 2
    """Plain rounds that may be lost before there is time to lose a share of."""

    FADE = 0.98

    def __init__(self, pace: Goodput) -> None:
        self.pace = pace
        self.ranks: list[float] = []
        self.reading, self.drafting = Times(), Times()
        self.rounds = self.idle = self.drafted = 0
        self.wait = pace.probe
        self.more, self.climbing = 0, False
        self.again: dict[int, int] = {}
        self.patience: dict[int, int] = {}
        self.spent = self.lost = 0.0
        self.mean = self.slowest = 1.0

    def next(self, most: int) -> int:
        if most == 0 or self.rounds < self.WARM:
            return 0
        if not self.ranks:
            return min(most, self.FIRST)
        best = max(sizes(most), key=self.goodput)
        if best and self._affordable():
            return self._climbed(best, most)
        if self.idle < self.wait:
            return 0
        tried = max(sizes(most)[1:], key=self.goodput)
        if not self._affordable(self.seconds(tried) - self.seconds(0)):
            return 0
        self.wait = min(2 * self.wait, self.pace.rare)
        return tried

    def _affordable(self, more: float = 0.0) -> bool:
        """Whether `more` seconds may be lost."""
        return self.lost + more <= self.pace.loss * self.spent + self.FREE * self.seconds(0)

    def quiet(self) -> int:
        """What drafts would gain is looked up again after `RUN` rounds at most: the times may have changed."""
        if self.rounds < self.WARM:
            return self.WARM - self.rounds - 1
        waiting = self.wait - self.idle
        return (min(RUN, waiting) if waiting > 0 else RUN) - 1  # it waits no more: a try is not affordable yet

    def _climbed(self, best: int, most: int) -> int:
        """`best`, or more of them where the last ones stood; each such number ever more seldom while it gains nothing."""
        more = min(self.more, most)
        self.climbing = more > best and self.rounds + 1 >= self.again.get(more, 0)
        return more if self.climbing else best

    def goodput(self, nodes: int) -> float:
        """Expected tokens per second of a round with so many drafts."""
        gain = 1 + self.slowest / self.mean * sum(self.ranks[:nodes])
        return gain / max(self.seconds(nodes), 1e-9)

    def seconds(self, nodes: int) -> float:
        """Of a round with so many drafts."""
        return self.reading.of(nodes) + (self.drafting.of(nodes) if nodes else 0.0)

    def learn(self, done: Round) -> None:
        self.rounds += 1
        self.spent += done.seconds
        if self.rounds > 1:
            self.reading.add(done.nodes, done.verify + done.commit)
        self.idle = 0 if done.asked else self.idle + 1
        if not done.asked:
            return
        self.drafting.add(done.asked, done.draft)
        self.drafted += 1
        gained = (sum(done.written) - done.rows) / max(1, done.rows)
        ahead = done.ahead or 1 + gained
        self.mean, self.slowest = self.FADE * self.mean + gained, self.FADE * self.slowest + ahead - 1
        if self.drafted > 1:
            self.lost += self.seconds(done.asked) - ahead * self.seconds(0)
        if ahead * self.seconds(0) >= self.seconds(done.asked):
            self.wait = self.pace.probe
        stood = gained >= 0.75 * done.asked
        self.more = 2 * done.asked if stood else 0
        if self.climbing:
            self.patience[done.asked] = 1 if stood else min(2 * self.patience.get(done.asked, 1), self.pace.rare)
            self.again[done.asked] = self.rounds + self.patience[done.asked]
        share = max(1 / self.pace.memory, 1 / (self.drafted + 2))
        while len(self.ranks) < done.asked:
            self.ranks.append(0.5 * self.ranks[-1] if self.ranks else 0.5)
        for rank in range(done.asked):
            accepted = done.ranks[rank] if rank < len(done.ranks) else 0
            self.ranks[rank] += share * (accepted / max(1, done.rows) - self.ranks[rank])
