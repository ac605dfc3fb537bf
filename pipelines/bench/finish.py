"""A photo finish: candidates are timed in turn, round after round, so that the pace of the machine meets all of them alike.

A candidate that is measured on all samples minutes after another one is compared with it by two clocks: what else runs on the
machine has changed between. Here every round has all of them once, each time another one first, on one sample.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hasten.pipelines.bench.candidates import Candidate
from hasten.pipelines.bench.shots import shoot
from hasten.pipelines.tune.trials import Bench

ROUNDS = 7


def photo_finish(bench: Bench, candidates: Sequence[Candidate], rounds: int = ROUNDS) -> list[float]:
    """Speed-up of every candidate: the median over the rounds of what the plain run of the same round took, relative to it."""
    runners: list[Candidate | None] = [None, *candidates]
    found: list[list[float]] = [[] for _ in candidates]
    for turn in range(rounds):
        sample, took = bench.samples[turn % len(bench.samples)], [0.0] * len(runners)
        for number in range(len(runners)):
            place = (number + turn) % len(runners)
            took[place] = bench.cost(shoot(bench.pipe, sample, bench.call, runners[place]))
        for each, seconds in zip(found, took[1:], strict=True):
            each.append(took[0] / seconds)
    return [statistics.median(each) for each in found]
