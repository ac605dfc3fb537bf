"""The account of one run: what every level has spent of one tolerance, in squared errors of the final latents.

A level (reuse, guidance, attention) is a `Spender`. Errors of different levels are taken as independent, so their squares
add; within a level each knows better. Levels whose errors point the same way add up to more: the tuner reports such pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hasten.agree import Mean, alone
from hasten.step import Step

LEAST = 0.02
"""Share of the tolerance's square that stays available when everything is spent, so that steps which cost next to
nothing may still be skipped."""

Told = Callable[[float], None]


class Spender(Protocol):
    """One part that spends. level: its axis on the recipe."""

    level: str

    @property
    def square(self) -> float:
        """Squared relative error of the final latents that it is estimated to have caused so far."""


class Account:
    """One tolerance and who spends of it. A part that is alone in a run has one of its own.

    tolerance: |latents - plain latents| / |plain latents| at the end of the run that may be reached (rms).
    agree: makes the numbers of all ranks that share a sample one.
    """

    agree: Mean = staticmethod(alone)

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.members: list[Spender] = []
        self._asked: list[tuple[Tensor, Told]] = []

    def join(self, member: Spender) -> None:
        """`member` spends of this account from now on."""
        self.members.append(member)

    # --- what is spent ----------------------------------------------------------------------------

    @property
    def levels(self) -> int:
        """How many levels share the tolerance, at least 1."""
        return max(1, len({member.level for member in self.members}))

    @property
    def estimate(self) -> float:
        """Relative error of the final latents that all levels together are estimated to have caused."""
        return math.sqrt(math.fsum(member.square for member in self.members))

    @property
    def by_level(self) -> dict[str, float]:
        """The same, level by level."""
        found: dict[str, float] = {}
        for member in self.members:
            found[member.level] = found.get(member.level, 0.0) + member.square
        return {level: math.sqrt(square) for level, square in found.items()}

    def others(self, member: Spender) -> float:
        """Squared error that everybody else has spent."""
        return math.fsum(other.square for other in self.members if other is not member)

    def per_gap(self, member: Spender, spent: float, gaps: float) -> float:
        """Error (not squared) that one gap of `member` may add: what is left, in equal parts for its `gaps` to come.

        spent: what its closed gaps have cost (squared). The other levels' gaps to come want as much.
        """
        budget = self.tolerance**2
        return math.sqrt(max(budget - spent - self.others(member), LEAST * budget) / gaps / self.levels)

    def until_end(self, member: Spender) -> float:
        """Error (not squared) that `member` may have caused at the end of the run: what it has, and its part of what is left."""
        budget = self.tolerance**2
        left = max(budget - member.square - self.others(member), LEAST * budget)
        return math.sqrt(member.square + left / self.levels)

    def open_to(self, member: Spender) -> float:
        """The tolerance that the other levels have left to `member`."""
        return self.tolerance * math.sqrt(max(1 - self.others(member) / self.tolerance**2, LEAST))

    # --- numbers on the device --------------------------------------------------------------------

    def ask(self, value: Tensor, told: Told) -> None:
        """Tell `told` the number `value` (0-d) with the next reading, which is one step later: it is ready by then."""
        self._asked.append((value, told))

    def pending(self) -> list[Tensor]:
        """What `tell` wants to know, for a caller that reads numbers anyway."""
        return [value for value, _ in self._asked]

    def tell(self, values: Sequence[float]) -> None:
        """The numbers of `pending` are known."""
        asked, self._asked = self._asked, []
        for (_, told), value in zip(asked, values, strict=True):
            told(value)

    def read(self) -> None:
        """Fetch what was asked for, in one host synchronisation; none where nothing was, or another level has read it."""
        if self._asked:
            self.tell(self.agree(torch.stack([value.float() for value in self.pending()])).tolist())


class LeftOut:
    """What a level is charged that leaves out a known share of an evaluation and measures no error: attention.

    An attention output that reads a share rho of the softmax mass and nothing else differs from the whole one by 1 - rho of
    the difference between what it read and what it did not; that is taken to be as large as the output itself, and the
    network's output to be off by the mean of this over its calls. It counts until the next evaluation, and adds up over the
    run without any cancelling. What stands in for the rest makes the true error smaller: docs/budget.md has by how much.
    """

    def __init__(self, level: str) -> None:
        self.level = level
        self.share, self.total, self._since = 0.0, 0.0, 0.0

    @property
    def square(self) -> float:
        return (self.total + self.share * self._since) ** 2

    def passed(self, step: Step, times: Sequence[float], *, evaluated: bool) -> None:
        """The solver has taken `step`, whose network was `evaluated`, or not."""
        if evaluated:  # what was before it is settled; what it left out is told with the next reading
            self.total, self._since = self.total + self.share * self._since, 0.0
        self._since += effect(step, times)

    def affordable(self, account: Account, step: Step, times: Sequence[float]) -> float:
        """Share (0 to 1) that every evaluation behind `step` may leave out, so that this level stays within its part of `account`."""
        after = times[step.index + 1] if step.index + 1 < len(times) else 0.0
        ahead = abs(angle(step, after) - angle(step, 0.0)) * sensitivity(step)
        return min(1.0, (account.until_end(self) - math.sqrt(self.square)) / ahead) if ahead > 0 else 1.0

    def told(self, share: float) -> None:
        """The latest evaluation left out `share` (0 to 1). NaN counts as all."""
        self.share = share if math.isfinite(share) else 1.0


def angle(step: Step, time: float) -> float:
    """atan(sigma / alpha) in [0, pi / 2] at `time`, on the path that `step` is on."""
    if step.level is not None and abs(step.level.sigma - step.time) < 1e-6:  # flow matching: time is sigma
        return math.atan2(time, 1 - time)
    return time * math.pi / 2


def effect(step: Step, times: Sequence[float]) -> float:
    """How far an output that is off by one moves the latents, at unit variance: |b| times the angle walked.

    On the unit circle (`Level.velocity`) a Gaussian keeps its size, so what is added now is there at the end. times:
    `Step.time` of each step of the run.
    """
    after = times[step.index + 1] if step.index + 1 < len(times) else 0.0
    return abs(angle(step, step.time) - angle(step, after)) * sensitivity(step)


def sensitivity(step: Step) -> float:
    """|b| of `Level.velocity`: what an output that is off by one changes per angle walked; 1 where it is not known."""
    velocity = step.level.velocity if step.level is not None else None
    return abs(velocity[1]) if velocity is not None else 1.0
