"""The search: optuna asks, recipes run, and every trial is in a journal, so that a killed study goes on.

`Search` is what all studies share; `Study` is that of pictures and clips, with two objectives: seconds relative to the plain
run, and the worst sample's distance from the budget's limit. A trial that was given up after its first sample is pruned; what
is told of it is why. Several processes may search one study at once.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from hasten.errors import OutputError, ResumeError, UsageError
from hasten.pipelines.bench.foreign import because
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.space import Params, Space, first_guesses, neighbours
from hasten.pipelines.tune.trials import Bench, Measured, Outcome
from hasten.pipelines.tune.workers import ALONE, FileLock, Worker, alone, mended
from hasten.recipe import Recipe, from_yaml

JOURNAL = "journal.log"
CAP = 120.0
"""dB (or its like) that an identical result counts as: optuna takes finite numbers."""

STALE = 50
"""Compositions asked one after the other that have been run before, after which there is nothing left to learn."""


class Result(Protocol):
    """What a recipe came to, as a search sees it."""

    @property
    def name(self) -> str: ...
    @property
    def why(self) -> str: ...
    @property
    def outcomes(self) -> Sequence[Any]: ...
    @property
    def speedup(self) -> float: ...


M = TypeVar("M", bound=Result)
M_co = TypeVar("M_co", bound=Result, covariant=True)


class Measures(Protocol[M_co]):
    """What runs recipes: `Bench`, or that of another kind of model. goal: give up on what is far from it."""

    def measure(self, name: str, recipe: Recipe, goal: Any = None) -> M_co: ...


class Ways(Protocol):
    """What is searched: `Space`, or that of another kind of model."""

    def ask(self, trial: Any) -> Params: ...
    def recipe(self, params: Params) -> Recipe: ...
    def name(self, params: Params) -> str: ...
    def described(self) -> dict[str, Any]: ...


@dataclass(frozen=True)  # with slots, `Trial(...)` below would fail in Python 3.11
class Tried(Generic[M]):
    """One composition that was run. params: its numbers. measured: on the tuning samples."""

    number: int
    params: Params
    recipe: Recipe
    measured: M


class Search(Generic[M]):
    """A search below `folder`, new or continued, alone or beside other processes. Subclasses say what a measurement is.

    identity: what must be the same for a journal to be continued (model, call, prompts, goal). Raises `ResumeError` where the
    folder has a study of something else; `UsageError` without optuna.
    """

    objectives: ClassVar[int] = 2

    def __init__(self, folder: Path, goal: Any, identity: dict[str, Any], seed: int = 0) -> None:
        self.folder, self.goal = folder, goal
        optuna = _optuna()
        self._states = optuna.trial.TrialState
        _made(folder)
        self.worker = Worker(folder)
        with alone(folder):
            self.others = self.worker.others()
            if not self.others:
                mended(folder / JOURNAL)
            backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL), lock_obj=FileLock.of(folder / JOURNAL))
            self.study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend), study_name="hasten",
                directions=["minimize"] * self.objectives, load_if_exists=True,
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # grouped sampling and lying are marked as experimental
                # Another process, and another start of this one, must not ask what the first one asked.
                self.study.sampler = optuna.samplers.TPESampler(
                    seed=seed + 7919 * self.others + len(self.study.get_trials(deepcopy=False)), multivariate=True, group=True,
                    n_startup_trials=12, constant_liar=True,
                )  # fmt: skip
            self.same(identity)
            self._broken_off()

    def same(self, identity: Mapping[str, Any]) -> None:
        """Keep what must be the same whenever this study is continued. Raises `ResumeError` where it is not."""
        given = json.loads(json.dumps(dict(identity)))
        known = {key: value for key, value in self.study.user_attrs.items() if key in given}
        if changed := [key for key in known if known[key] != given[key]]:
            self.worker.leave()
            raise ResumeError(
                f"'{self.folder}' holds a study with another {', another '.join(changed)}; its trials would not be comparable."
                " Give --study another folder, or remove this one."
            )
        for key, value in given.items():
            if key not in known:
                self.study.set_user_attr(key, value)

    def settled(self, name: str, value: int) -> int:
        """`value`, or what an earlier process of this study has settled on."""
        with alone(self.folder):
            if name not in self.study.user_attrs:
                self.study.set_user_attr(name, value)
            return int(self.study.user_attrs[name])

    def close(self) -> None:
        """This process has ended its search. Safe to call twice."""
        self.worker.leave()

    def _broken_off(self) -> None:
        """Trials that a killed process left running are asked again; those that two processes ended in are not."""
        for trial in self._trials(self._states.RUNNING):
            if not self.worker.lives(trial.user_attrs.get("worker", "")):
                self._ask_again(trial.number, trial, trial.user_attrs.get("ended", 0) + 1)

    def _ask_again(self, number: int, trial: Any, ended: int) -> None:
        """ended: how many processes have ended while it ran."""
        params = trial.params or trial.system_attrs.get("fixed_params")
        self.study.tell(number, state=self._states.FAIL)
        if params and ended < 2:
            self.study.enqueue_trial(params, user_attrs={"ended": ended})

    def _trials(self, *states: Any) -> list[Any]:
        return list(self.study.get_trials(deepcopy=False, states=states or None))

    @property
    def spent(self) -> float:
        """Seconds in which trials ran, those of earlier processes included; what ran at the same time counts once."""
        spans = [(t.datetime_start.timestamp(), t.user_attrs["seconds"]) for t in self._trials() if "seconds" in t.user_attrs]
        total, end = 0.0, -math.inf
        for start, seconds in sorted(spans):
            total += max(0.0, start + seconds - max(start, end))
            end = max(end, start + seconds)
        return total

    def run(
        self, bench: Measures[M], space: Ways, seconds: float, guesses: Sequence[Params], told: Callable[[Tried[M]], None]
    ) -> None:
        """Run trials until `seconds` are spent (earlier processes' included), the guesses first."""
        self.same({"space": space.described()})
        with alone(self.folder):
            for guess in {_key(guess): guess for guess in guesses}.values():
                self.study.enqueue_trial(dict(guess), skip_if_exists=True)
        began, before, stale = time.monotonic(), self.spent, 0
        while before + time.monotonic() - began < seconds and stale < STALE:
            self._descend(space)
            trial = self._one(bench, space)
            stale = stale + 1 if trial is None else 0
            if trial is not None:
                told(trial)

    def _descend(self, space: Ways) -> None:
        """Have asked what is to be asked next, once nothing is waiting; else the sampler chooses."""
        with alone(self.folder):
            if self._trials(self._states.WAITING):
                return
            for params in self._next(space):
                if self._twin(params) is None:
                    self.study.enqueue_trial(dict(params), skip_if_exists=True)

    def _next(self, space: Ways) -> Sequence[Params]:
        """Compositions that are worth asking after all that was found; none leaves it to the sampler."""
        return ()

    def _one(self, bench: Measures[M], space: Ways) -> Tried[M] | None:
        """Run what is asked next; None where that has been run before."""
        started = time.monotonic()
        with alone(self.folder):
            asked = self.study.ask()
            asked.set_user_attr("worker", self.worker.name)
            params = space.ask(asked)
            if (twin := self._twin(params)) is not None:  # nothing is learnt from running it again
                done = twin.state == self._states.COMPLETE
                self.study.tell(asked, list(twin.values) if done else None, state=None if done else self._states.PRUNED)
                return None
        try:
            recipe, measured = self._measured(bench, space, params, asked)
        except BaseException:  # Ctrl-C: it is no fault of the composition
            asked.set_user_attr("interrupted", True)
            frozen = self.study.get_trials(deepcopy=False)[asked.number]
            self._ask_again(asked.number, frozen, frozen.user_attrs.get("ended", 0))
            raise
        asked.set_user_attr("seconds", time.monotonic() - started)
        values = self._values(measured)
        self.study.tell(asked, values, state=self._states.PRUNED if values is None else None)
        return Tried(asked.number, params, recipe, measured)

    def _measured(self, bench: Measures[M], space: Ways, params: Params, asked: Any) -> tuple[Recipe, M]:
        """Run a composition; what it is and what it costs is written down."""
        try:
            recipe = space.recipe(params)
            measured = bench.measure(recipe.name, recipe, self.goal)
        except Exception as error:  # noqa: BLE001 - parts that do not go together; the reason is what is reported
            recipe, measured = Recipe(name=space.name(params)), self._read(space.name(params), (), because(error))
        asked.set_user_attr("recipe", recipe.to_yaml())
        asked.set_user_attr("why", measured.why)
        asked.set_user_attr("outcomes", [each.to_dict() for each in measured.outcomes])
        return recipe, measured

    def _twin(self, params: Params) -> Any:
        """The trial that ran the same; also one in which two processes ended. None where there is none."""
        key = _key(params)
        for trial in self._trials():
            ran = "outcomes" in trial.user_attrs and trial.state in (self._states.COMPLETE, self._states.PRUNED)
            lost = trial.state == self._states.FAIL and trial.user_attrs.get("ended", 0) and "interrupted" not in trial.user_attrs
            if (ran or lost) and _key(trial.params) == key:
                return trial
        return None

    def _values(self, measured: M) -> list[float] | None:
        """What is minimised; None, and the trial is pruned, where too little is known."""
        raise NotImplementedError(f"{type(self).__name__} has no _values().")

    def _read(self, name: str, outcomes: Sequence[dict[str, Any]], why: str = "") -> M:
        """A measurement as the journal has it."""
        raise NotImplementedError(f"{type(self).__name__} has no _read().")

    def trials(self) -> list[Tried[M]]:
        """All finished trials that ran on every sample, by rising speed-up."""
        found = []
        for trial in self._trials(self._states.COMPLETE):
            if "outcomes" in trial.user_attrs and not trial.user_attrs["why"]:
                recipe = from_yaml(trial.user_attrs["recipe"], "the study")
                found.append(Tried(trial.number, trial.params, recipe, self._read(recipe.name, trial.user_attrs["outcomes"])))
        return sorted(found, key=lambda each: each.measured.speedup)

    def given_up(self) -> list[tuple[str, str]]:
        """(composition, reason) of those that did not run on every sample."""
        found = [trial for trial in self._trials(self._states.PRUNED, self._states.COMPLETE) if trial.user_attrs.get("why")]
        return [(from_yaml(trial.user_attrs["recipe"], "the study").name, trial.user_attrs["why"]) for trial in found]


Trial = Tried[Measured]


class Study(Search[Measured]):
    """The search of pictures and clips: the guesses, then downhill from what keeps a goal with the fewest evaluations, then
    optuna's sampler. Evaluations, and not seconds, for they have no noise."""

    goals: Sequence[Goal] = ()

    def search(
        self, bench: Bench, space: Space, seconds: float, told: Callable[[Trial], None] = lambda _: None, goals: Sequence[Goal] = (),
    ) -> None:  # fmt: skip
        """Run trials until `seconds` are spent. goals: of which each gets a composition; the study's own alone where none are
        named."""
        self.goals = tuple(goals) or (self.goal,)
        each = [first_guesses(space, goal.tolerance) for goal in self.goals]
        guesses = [guess for row in zip_longest(*each) for guess in row if guess is not None]  # every goal's best guesses first
        self.run(bench, space, seconds, guesses, told)

    def _next(self, space: Ways) -> Sequence[Params]:
        """Neighbours of the cheapest of each family that keeps a goal."""
        if not isinstance(space, Space):
            return ()
        found: list[Params] = []
        for goal in self.goals:
            best: dict[str, Trial] = {}
            for trial in self.trials():
                family = trial.params["family"]
                if trial.measured.nearly(goal) and (family not in best or trial.measured.nfe < best[family].measured.nfe):
                    best[family] = trial
            found += [params for trial in best.values() for params in neighbours(space, trial.params)]
        return found

    def _values(self, measured: Measured) -> list[float] | None:
        if not measured.whole:
            return None
        worst = measured.worst(self.goal)
        short = self.goal.better(self.goal.limit) - self.goal.better(worst) if math.isfinite(worst) else math.copysign(CAP, -self.goal.better(worst))
        return [1 / measured.speedup, max(-CAP, min(CAP, short))]

    def _read(self, name: str, outcomes: Sequence[dict[str, Any]], why: str = "") -> Measured:
        return Measured(name, tuple(Outcome(**each) for each in outcomes), why)


def front(trials: list[Trial], goal: Goal) -> list[Trial]:
    """Those that no other beats in speed and in the worst sample, by rising speed-up."""
    kept: list[Trial] = []
    for trial in sorted(trials, key=lambda each: -each.measured.speedup):
        if not kept or goal.better(trial.measured.worst(goal)) > goal.better(kept[-1].measured.worst(goal)):
            kept.append(trial)
    return kept[::-1]


def _made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ALONE).touch()
    except OSError as error:
        raise OutputError(
            f"The study cannot be kept in '{folder}': {error.strerror or error}. Give --study another folder."
        ) from None


def _key(params: Params) -> str:
    return json.dumps(dict(params), sort_keys=True)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UsageError("Tuning needs optuna. `pip install hasten[tune]`.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it writes a line for each trial; so do we
    return optuna
