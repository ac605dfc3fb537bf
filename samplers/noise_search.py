"""Search over starting noises: which noises to try, given what a verifier said of the results so far.

Ma et al., Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, arXiv 2501.09732, section 3. A verifier
gives each result a score, larger is better; it is never asked how the score changes with the noise.

Names: n evaluations of one whole run; NFE all evaluations of a search, a guided one counting once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import Field, model_validator

from hasten.errors import RecipeError, UsageError
from hasten.part import Part

LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Proposal:
    """A noise to try: sqrt(1 - radius^2) of the noise of candidate `parent` and radius of the noise that `seed` draws."""

    seed: int
    parent: int | None = None
    radius: float = 1.0


class NoiseSearch(Part):
    """Family of searches."""

    def evaluations(self, n: int) -> int:
        """NFE of the whole search."""
        raise NotImplementedError(f"{type(self).__name__} has no evaluations().")

    @classmethod
    def within(cls, budget: int, n: int) -> Self:
        """The largest search of this kind whose NFE is at most `budget`. Raises `UsageError` where there is none."""
        raise NotImplementedError(f"{cls.__name__} has no within().")


class Rounds(NoiseSearch):
    """Base of the searches that try whole runs, some at a time."""

    def start(self, seed: int) -> RoundsState:
        """Running state: which noises to try next."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class RoundsState:
    """What has been tried so far. `ask` says what to try next, nothing at the end; `tell` takes the scores, in that order."""

    def __init__(self, seed: int) -> None:
        self.seed, self.scores = seed, list[float]()

    def ask(self) -> list[Proposal]:
        raise NotImplementedError

    def tell(self, scores: list[float]) -> None:
        self.scores += scores

    @property
    def best(self) -> int:
        """The candidate with the highest score, the first of them where several have it."""
        return max(range(len(self.scores)), key=lambda number: (self.scores[number], -number))

    def fresh(self, count: int) -> list[int]:
        """Seeds that follow those that were handed out: a longer search tries what a shorter one does, and more."""
        return [(self.seed + len(self.scores) + number) % LARGEST for number in range(count)]


class RandomNoises(Rounds):
    """`count` noises, of the seeds that follow the first one (random search, section 3.2)."""

    kind: ClassVar[str] = "random"
    count: int = Field(8, ge=1)

    def evaluations(self, n: int) -> int:
        return self.count * n

    @classmethod
    def within(cls, budget: int, n: int) -> Self:
        _enough(budget, n, "random")
        return cls(count=budget // n)

    def start(self, seed: int) -> RoundsState:
        return _Random(self, seed)


class _Random(RoundsState):
    def __init__(self, policy: RandomNoises, seed: int) -> None:
        super().__init__(seed)
        self.policy = policy

    def ask(self) -> list[Proposal]:
        return [] if self.scores else [Proposal(seed) for seed in self.fresh(self.policy.count)]


class NearbyNoises(Rounds):
    """Go from one noise to the best of its neighbours, again and again (zero-order search, section 3.2).

    neighbours: how many are tried around the best so far. rounds: how often. radius: of the neighbourhood, the share of new
    noise; the sum has unit variance, where the paper adds noise and leaves the norm to the solver.
    """

    kind: ClassVar[str] = "zero-order"
    neighbours: int = Field(3, ge=1)
    rounds: int = Field(2, ge=1)
    radius: float = Field(0.5, gt=0, le=1)

    def evaluations(self, n: int) -> int:
        return (1 + self.rounds * self.neighbours) * n

    @classmethod
    def within(cls, budget: int, n: int) -> Self:
        _enough(budget, 2 * n, "zero-order")
        runs = budget // n - 1
        neighbours = min(3, runs)
        return cls(neighbours=neighbours, rounds=runs // neighbours)

    def start(self, seed: int) -> RoundsState:
        return _Nearby(self, seed)


class _Nearby(RoundsState):
    def __init__(self, policy: NearbyNoises, seed: int) -> None:
        super().__init__(seed)
        self.policy = policy

    def ask(self) -> list[Proposal]:
        if not self.scores:
            return [Proposal(self.seed % LARGEST)]
        if len(self.scores) > (self.policy.rounds - 1) * self.policy.neighbours + 1:
            return []
        return [Proposal(seed, self.best, self.policy.radius) for seed in self.fresh(self.policy.neighbours)]


class Paths(NoiseSearch):
    """Keep the best `paths` of several runs while they are under way (search over paths, section 3.2).

    All walk to `begin`. From then on each is made noisier by `back` of n levels, `branches` times with noise of its own,
    walked `ahead` levels on from where it was, and looked at: one evaluation more shows the data that the network sees there.
    The best `paths` of all go on. begin: share of the run. The solver is first order between looks.
    """

    kind: ClassVar[str] = "paths"
    paths: int = Field(2, ge=1)
    branches: int = Field(2, ge=1)
    begin: float = Field(0.3, gt=0, lt=1)
    back: int = Field(1, ge=1)
    ahead: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _goes_on(self) -> Paths:
        if self.paths * self.branches == 1:
            raise RecipeError("search.paths and branches are both 1, so there is nothing to choose from; make one of them larger")
        return self

    def looks(self, n: int) -> list[int]:
        """Levels from which branches start, rising; the last are `ahead` levels before the end, or more."""
        first = max(self.back, round(self.begin * n))
        return list(range(first, n - self.ahead, self.ahead))

    def evaluations(self, n: int) -> int:
        looks = self.looks(n)
        return self.paths * n + len(looks) * self.paths * (
            self.branches * (self.back + self.ahead + 1) - self.ahead
        )

    @classmethod
    def within(cls, budget: int, n: int) -> Self:
        sizes = [(paths, branches) for paths in range(1, budget + 1) for branches in (2,) if paths * n <= budget]
        fits = [made for paths, branches in sizes if (made := cls(paths=paths, branches=branches)).evaluations(n) <= budget]
        if not fits:
            _enough(budget, cls(paths=1, branches=2).evaluations(n), "paths")
        return fits[-1]


def _enough(budget: int, least: int, kind: str) -> None:
    if budget < least:
        raise UsageError(
            f"A {kind} search at this number of steps takes at least {least} evaluations, got a budget of {budget}. Raise it,"
            " or ask for fewer steps."
        )
