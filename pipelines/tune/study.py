"""The search: optuna asks, recipes run, and every trial is in a journal, so that a killed study goes on.

Two objectives: seconds relative to the plain run, and the worst sample's distance from the budget's limit. A trial that was
given up after its first sample is pruned; what is told of it is why.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import ResumeError, UsageError
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.space import Params, Space, first_guesses
from hasten.pipelines.tune.trials import Bench, Measured, Outcome
from hasten.recipe import Recipe, from_yaml

JOURNAL = "journal.log"
CAP = 120.0
"""dB (or its like) that an identical result counts as: optuna takes finite numbers."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One composition that was run. params: its numbers. measured: on the tuning samples."""

    number: int
    params: Params
    recipe: Recipe
    measured: Measured


class Study:
    """A search below `folder`, new or continued.

    identity: what must be the same for a journal to be continued (model, call, prompts, goal). Raises `ResumeError` where the
    folder has a study of something else; `UsageError` without optuna.
    """

    def __init__(self, folder: Path, goal: Goal, identity: dict[str, Any], seed: int = 0) -> None:
        self.folder, self.goal = folder, goal
        optuna = _optuna()
        folder.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # grouped sampling is marked as experimental
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=12)
        self.study = optuna.create_study(
            storage=storage, study_name="hasten", sampler=sampler, directions=["minimize", "minimize"], load_if_exists=True
        )
        known = self.study.user_attrs.get("identity")
        if known is not None and known != json.loads(json.dumps(identity)):
            changed = [key for key in identity if known.get(key) != json.loads(json.dumps(identity[key]))]
            raise ResumeError(f"'{folder}' holds a study with another {', '.join(changed)}. Give --study another folder, or remove it.")
        self.study.set_user_attr("identity", identity)
        self._complete, self._pruned, self._failed = (
            optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.FAIL,
        )  # fmt: skip
        self._broken_off(optuna.trial.TrialState.RUNNING)

    def _broken_off(self, running: Any) -> None:
        """Trials that a killed process left running are asked again."""
        for trial in self.study.get_trials(deepcopy=False, states=(running,)):
            self.study.tell(trial.number, state=self._failed)
            if trial.params:
                self.study.enqueue_trial(trial.params)

    @property
    def spent(self) -> float:
        """Seconds of all trials, those of earlier processes included."""
        return float(sum(trial.user_attrs.get("seconds", 0.0) for trial in self.study.get_trials(deepcopy=False)))

    def search(
        self, bench: Bench, space: Space, seconds: float, told: Callable[[Trial], None] = lambda _: None,
        tolerances: Sequence[float] = (),
    ) -> None:  # fmt: skip
        """Run trials until `seconds` are spent (earlier processes' included), the first guesses first: for the goal's own
        tolerance, or for each of `tolerances`."""
        if not self.study.get_trials(deepcopy=False):
            guesses = [guess for tolerance in tolerances or (self.goal.tolerance,) for guess in first_guesses(space, tolerance)]
            for guess in {_key(guess): guess for guess in guesses}.values():
                self.study.enqueue_trial(guess)
        began, before = time.monotonic(), self.spent
        seen = {_key(trial.params): trial for trial in self.study.get_trials(deepcopy=False) if trial.state == self._complete}
        while before + time.monotonic() - began < seconds:
            self._one(bench, space, seen, told)

    def _one(self, bench: Bench, space: Space, seen: dict[str, Any], told: Callable[[Trial], None]) -> None:
        started = time.monotonic()
        trial = self.study.ask()
        params = space.ask(trial)
        if (twin := seen.get(_key(params))) is not None:  # nothing is learnt from running it again
            self.study.tell(trial, list(twin.values))
            return
        try:
            recipe = space.recipe(params)
            measured = bench.measure(recipe.name, recipe, self.goal)
        except (UsageError, ValueError) as error:
            recipe, measured = Recipe(name=space.name(params)), Measured(space.name(params), (), str(error))
        trial.set_user_attr("recipe", recipe.to_yaml())
        trial.set_user_attr("why", measured.why)
        trial.set_user_attr("outcomes", [each.to_dict() for each in measured.outcomes])
        trial.set_user_attr("seconds", time.monotonic() - started)
        if measured.whole:
            self.study.tell(trial, self._values(measured))
            seen[_key(params)] = self.study.get_trials(deepcopy=False)[trial.number]
        else:
            self.study.tell(trial, state=self._pruned)
        told(Trial(trial.number, params, recipe, measured))

    def _values(self, measured: Measured) -> list[float]:
        worst = measured.worst(self.goal)
        short = self.goal.better(self.goal.limit) - self.goal.better(worst) if math.isfinite(worst) else math.copysign(CAP, -self.goal.better(worst))
        return [1 / measured.speedup, max(-CAP, min(CAP, short))]

    def trials(self) -> list[Trial]:
        """All finished trials that ran on every sample, by rising speed-up."""
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state != self._complete or "outcomes" not in trial.user_attrs:
                continue
            outcomes = tuple(Outcome(**each) for each in trial.user_attrs["outcomes"])
            recipe = from_yaml(trial.user_attrs["recipe"], "the study")
            found.append(Trial(trial.number, trial.params, recipe, Measured(recipe.name, outcomes)))
        return sorted(found, key=lambda each: each.measured.speedup)

    def given_up(self) -> list[tuple[str, str]]:
        """(composition, reason) of those that did not run on every sample."""
        found = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state == self._pruned]
        return [(from_yaml(trial.user_attrs["recipe"], "the study").name, trial.user_attrs["why"]) for trial in found]


def front(trials: list[Trial], goal: Goal) -> list[Trial]:
    """Those that no other beats in speed and in the worst sample, by rising speed-up."""
    kept: list[Trial] = []
    for trial in sorted(trials, key=lambda each: -each.measured.speedup):
        if not kept or goal.better(trial.measured.worst(goal)) > goal.better(kept[-1].measured.worst(goal)):
            kept.append(trial)
    return kept[::-1]


def _key(params: Params) -> str:
    return json.dumps(dict(params), sort_keys=True)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UsageError("Tuning needs optuna. `pip install hasten[tune]`.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it writes a line for each trial; so do we
    return optuna
