"""The best few noise levels out of many, from one recorded fine run; and a search over subsets when only trying can tell.

AutoDiffusion (arXiv 2309.10438) searches timesteps, and which layers run at them, by evolution on the Frechet distance of
generated pictures. What differs: the start of the search is the shortest way through one recorded run, and what is
measured is left to the caller (the distance to the own fine result, in `hasten.pipelines.autodiffusion`).

Names: N evaluations of the fine run, n of the coarse one; x the latents, D the data that the network sees in them; level i
has alpha_i, sigma_i, and lambda_i = log(alpha_i / sigma_i). The result of the run is level N, without noise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.errors import UsageError
from hasten.level import Level
from hasten.part import Part

Subset = tuple[int, ...]
"""Rising numbers of what is chosen."""


@dataclass(slots=True)
class Recorded:
    """One fine run. levels, shares: of its N evaluations, falling; shares as in `Solver.times`.

    gram: [2 N + 1, 2 N + 1] float64, inner products of x_0 ... x_N, D_0 ... D_{N-1} in this order. size: numbers in a latent.
    """

    levels: list[Level]
    shares: list[float]
    gram: Tensor
    size: int

    @property
    def steps(self) -> int:
        return len(self.levels)


def best_sequence(runs: Sequence[Recorded], n: int, *, order: int = 1) -> Subset:
    """The n of N evaluations with the least sum of squared local errors over the recorded runs; 0 is always among them.

    order: 1 for solvers that use one output at a time (DDIM; Euler), 2 for DPM-Solver++(2M), whose error depends on the
    step before, too. A local error is what one step off the recorded path misses it by, in norm, times what is left of it
    at the end on data that are Gaussian with the recorded spread s: s / sqrt(alpha^2 s^2 + sigma^2). Squares, as errors of
    different steps point different ways; their plain sum, and other factors, were tried and gave worse runs. Exact, by
    dynamic programming: N^2 n comparisons for order 1, N^3 n for order 2. Raises `UsageError` unless 1 <= n <= N and the runs
    have the same levels.
    """
    total = runs[0].steps if runs else 0
    if not 1 <= n <= total or any(run.shares != runs[0].shares for run in runs):
        raise UsageError(
            f"A sequence of {n} evaluations is wanted from {len(runs)} recorded runs of {total}. It takes at least one run, all"
            f" of them at the same levels, and between 1 and {total} evaluations."
        )
    if order == 1:
        return _shortest(sum((local_errors(run) ** 2 for run in runs), torch.zeros(())), n)
    if order == 2:
        first = sum((local_errors(run)[0] ** 2 for run in runs), torch.zeros(()))
        return _shortest_of_pairs(first, sum((local_errors_2m(run) ** 2 for run in runs), torch.zeros(())), n)
    raise UsageError(f"order must be 1 or 2, got {order}; solvers of higher order are searched by trying (`Evolution`).")


# --- what a step misses the path by ----------------------------------------------------------------


def local_errors(run: Recorded) -> Tensor:
    """[N, N + 1] float64: of a first-order step from i to k > i, x = (sigma_k / sigma_i) x_i + c_ik D_i; infinite elsewhere.

    c_ik = alpha_k - alpha_i sigma_k / sigma_i.
    """
    alpha, sigma, _ = _table(run)
    N = run.steps
    carried = sigma[None, :] / sigma[:N, None]
    c = alpha[None, :] - alpha[:N, None] * carried
    x, D = torch.arange(N + 1), torch.arange(N) + N + 1
    G = run.gram
    squares = (
        G.diagonal()[x][None, :] + (carried**2) * G.diagonal()[x[:N]][:, None] + c**2 * G.diagonal()[D][:, None]
        - 2 * carried * G[x[:N]][:, x] - 2 * c * G[D][:, x] + 2 * carried * c * G[x[:N], D][:, None]
    )  # fmt: skip
    errors = squares.clamp_min(0).sqrt() * _left_at_the_end(run)[None, :]
    return errors.masked_fill(torch.ones(N, N + 1).tril().bool(), float("inf"))


def local_errors_2m(run: Recorded) -> Tensor:
    """[N, N, N + 1] float64: of a step of DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) from i to k after one from h to i.

    It takes D_i + (D_i - D_h) (lambda_k - lambda_i) / (2 (lambda_i - lambda_h)) for the data, and D_i alone in its last step.
    """
    alpha, sigma, lam = _table(run)
    N, G = run.steps, run.gram
    carried = sigma[None, :] / sigma[:N, None]
    c = alpha[None, :] - alpha[:N, None] * carried
    ahead = (lam[None, None, :] - lam[None, :N, None]) / (2 * (lam[None, :N, None] - lam[:N, None, None]))
    ahead[:, :, N] = 0.0
    one, two = c[None] * (1 + ahead), -c[None] * ahead
    x, D = torch.arange(N + 1), torch.arange(N) + N + 1
    d = G.diagonal()
    squares = (
        d[x] + carried[None] ** 2 * d[x[:N]][None, :, None] + one**2 * d[D][None, :, None] + two**2 * d[D][:, None, None]
        - 2 * carried[None] * G[x[:N]][:, x][None] - 2 * one * G[D][:, x][None] - 2 * two * G[D][:, x][:, None, :]
        + 2 * carried[None] * one * G[x[:N], D][None, :, None] + 2 * carried[None] * two * G[D][:, x[:N]][:, :, None]
        + 2 * one * two * G[D][:, D][:, :, None]
    )  # fmt: skip
    errors = squares.clamp_min(0).sqrt() * _left_at_the_end(run)
    rising = torch.arange(N)[:, None] < torch.arange(N)[None, :]
    later = torch.arange(N)[:, None] < torch.arange(N + 1)[None, :]
    return errors.masked_fill(~(rising[:, :, None] & later[None]), float("inf")).nan_to_num(nan=float("inf"), posinf=float("inf"))


def _table(run: Recorded) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and lambda of all N + 1 levels."""
    end = Level(1.0, 0.0)
    levels = [*run.levels, end]
    return tuple(  # type: ignore[return-value]
        torch.tensor(values, dtype=torch.float64)
        for values in ([v.alpha for v in levels], [v.sigma for v in levels], [v.log_snr for v in levels])
    )


def _left_at_the_end(run: Recorded) -> Tensor:
    alpha, sigma, _ = _table(run)
    spread = (run.gram[run.steps, run.steps] / run.size).sqrt()
    return spread / (alpha**2 * spread**2 + sigma**2).sqrt()


# --- the shortest way ------------------------------------------------------------------------------


def _shortest(cost: Tensor, n: int) -> Subset:
    """From 0 to N in n jumps; cost[i, k] of one, infinite for k <= i."""
    best, came = cost[0], list[Tensor]()
    for _ in range(n - 1):
        after, origin = (best[:-1, None] + cost).min(0)
        best, came = after, [*came, origin]
    return _walked_back(came, cost.shape[1] - 1)


def _walked_back(came: list[Tensor], end: int) -> Subset:
    places = [end]
    for origin in reversed(came):
        places.append(int(origin[places[-1]]))
    return tuple(sorted({0, *places[1:]}))


def _shortest_of_pairs(first: Tensor, cost: Tensor, n: int) -> Subset:
    """The same where the jump from i to k costs cost[h, i, k] after one from h; the first one, which has none before it, first[k]."""
    N = cost.shape[0]
    best, came = first.new_full((N, N + 1), float("inf")), list[Tensor]()
    best[0] = first
    for _ in range(n - 1):
        after, origin = (best[:, :N, None] + cost).min(0)
        best, came = after, [*came, origin]
    here, there = int(best[:, N].argmin()), N
    places = {0, here}
    for origin in reversed(came):
        here, there = int(origin[here, there]), here
        places.add(here)
    return tuple(sorted(places))


# --- where only trying can tell --------------------------------------------------------------------


@dataclass(slots=True)
class Found:
    """What a search came to. tried: every subset and its cost, in the order in which they were tried."""

    best: Subset
    cost: float
    tried: dict[Subset, float] = field(default_factory=dict)


class Evolution(Part):
    """Search over subsets of a given size by mutation and crossover, as AutoDiffusion does (its algorithm 1).

    parents: how many of the best have offspring (official 10 of a population of 50). offspring: new ones per round, half
    of them mutated parents, half crossed ones (official 25 and 25). rate: chance of each member to move (official 0.1; at
    least one does). trials: how many costs may be asked for in all. seed: of all choices; the same search again is the same.
    """

    kind: ClassVar[str] = "evolution"
    parents: int = Field(6, ge=2)
    offspring: int = Field(12, ge=2)
    rate: float = Field(0.1, gt=0, le=1)
    trials: int = Field(60, ge=1)
    seed: int = 0

    def search(
        self, start: Iterable[Subset], places: int, cost: Callable[[Subset], float], fixed: Iterable[int] = ()
    ) -> Found:
        """The cheapest subset of range(`places`) that was tried, beginning with `start`, all of one size; `fixed` are in all.

        Raises `UsageError` for starts of several sizes, outside the places, or without what is fixed.
        """
        first, kept = [tuple(sorted(set(one))) for one in start], frozenset(fixed)
        good = all(kept <= set(one) and (not one or (one[0] >= 0 and one[-1] < places)) for one in first)
        if not first or len({len(one) for one in first}) != 1 or not good:
            raise UsageError(
                f"A search needs starts of one size within 0 ... {places - 1} that have {sorted(kept)} in them, got {first}."
            )
        chance, tried = random.Random(self.seed), dict[Subset, float]()
        self._try(first, cost, tried)
        while len(tried) < self.trials:
            ranked = sorted(tried, key=lambda one: (tried[one], one))[: self.parents]
            born = [self._mutated(chance, chance.choice(ranked), places, kept) for _ in range(self.offspring // 2)]
            pairs = [(chance.choice(ranked), chance.choice(ranked)) for _ in range(self.offspring - len(born))]
            born += [_crossed(chance, one, other, kept) for one, other in pairs]
            before = len(tried)
            self._try(born, cost, tried)
            if len(tried) == before and len(ranked) == len(tried):
                break  # so few places that all that can be born is known
        best = min(tried, key=lambda one: (tried[one], one))
        return Found(best, tried[best], tried)

    def _try(self, subsets: Iterable[Subset], cost: Callable[[Subset], float], tried: dict[Subset, float]) -> None:
        for one in subsets:
            if one not in tried and len(tried) < self.trials:
                tried[one] = cost(one)

    def _mutated(self, chance: random.Random, parent: Subset, places: int, fixed: frozenset[int]) -> Subset:
        members, movable = set(parent), [member for member in parent if member not in fixed]
        free = [place for place in range(places) if place not in members]
        if not movable or not free:
            return parent
        moved = [member for member in movable if chance.random() < self.rate] or [chance.choice(movable)]
        for member in moved:
            # Half of the moves are to the next free place: near a good sequence the better ones are its neighbours.
            near = sorted(free, key=lambda place: abs(place - member))[:2]
            place = chance.choice(near if chance.random() < 0.5 else free)
            members.remove(member)
            members.add(place)
            free[free.index(place)] = member
        return tuple(sorted(members))


def _crossed(chance: random.Random, one: Subset, other: Subset, fixed: frozenset[int]) -> Subset:
    """Members of both, and of the rest as many as are missing."""
    shared = set(one) & set(other) | fixed
    rest = sorted((set(one) | set(other)) - shared)
    return tuple(sorted(shared | set(chance.sample(rest, len(one) - len(shared)))))
