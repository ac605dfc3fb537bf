"""What is searched: compositions of the axes, each written as a handful of numbers and turned into a `Recipe`.

A family is one way of saving steps; guidance and attention compose with each of them. Numbers are asked of an optuna trial,
so that its sampler learns which matter; a family asks for its own only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.caching.network import NetworkReuse
from hasten.caching.signals import OutputChange
from hasten.drift import Drift
from hasten.errors import RecipeError
from hasten.forecast import LeaveOneOut
from hasten.ledger import Ledger
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.tune.plan import FORECASTS, Plan, best_plan
from hasten.pipelines.tune.signals import Signals
from hasten.recipe import Guidance, Recipe
from hasten.samplers.guidance import AdaptiveGuidance, ListedGuidance
from hasten.samplers.solver import Solver

SOLVERS = ("unipc", "dpm++")

FEW = ("solver", "fitted")
"""Families of few long steps, of which some may be without the second branch."""

FEWEST, MOST = 3, 10
"""Evaluations of a fitted solver."""

UNGUIDED = 4
"""At most so many steps of a few are without the second branch."""

Fit = Callable[[int, Guidance | None], Recipe]
"""A solver of so many evaluations and this guidance, fitted to the plain runs."""

Params = Mapping[str, Any]


@dataclass
class Space:
    """What can be searched on one host. steps: of the plain run. guided: whether a second branch is evaluated. signals: of
    plain runs, empty where their solver is not first-order: then no plan can be judged beforehand. attention, adapters:
    recipes (names or files) that each may be added. fit: makes fitted solvers, None where the host allows none. thinking: seconds that the search
    of one plan may take."""

    steps: int
    guided: bool
    signals: Sequence[Signals] = ()
    attention: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    fit: Fit | None = None
    thinking: float = math.inf
    _plans: dict[tuple[int, int | None, int], Plan] = field(default_factory=dict)

    @property
    def families(self) -> list[str]:
        found = (["fitted"] if self.fit is not None else []) + (["plan"] if self.signals else []) + ["solver", "drift", "ledger"]
        return found + (["preset"] if self.presets else []) + (["student"] if self.adapters else [])

    def described(self) -> dict[str, Any]:
        """What two processes must have in common to search one study."""
        return {
            "steps": self.steps, "guided": self.guided, "families": self.families, "solvers": SOLVERS, "forecasts": len(FORECASTS),
            "attention": self.attention, "adapters": self.adapters, "presets": self.presets,
        }  # fmt: skip

    def ask(self, trial: Any) -> Params:
        """Numbers of a new composition. trial: an optuna trial, fixed or not."""
        family = trial.suggest_categorical("family", self.families)
        params: dict[str, Any] = {"family": family}
        if family == "preset":
            return params | {"preset": trial.suggest_categorical("preset", list(self.presets))}
        if family == "student":
            return params | {"student": trial.suggest_categorical("student", list(self.adapters))}
        if family == "plan":
            params["computed"] = trial.suggest_int("computed", 3, max(4, self.steps // 2))
            params["forecast"] = trial.suggest_categorical("forecast", list(range(len(FORECASTS))))
        if family == "solver":
            params["solver"] = trial.suggest_categorical("solver", list(SOLVERS))
            params["steps"] = trial.suggest_int("steps", 3, max(4, self.steps * 2 // 3))
            params["order"] = trial.suggest_categorical("order", [2, 3])
        if family == "fitted":
            params["steps"] = trial.suggest_int("steps", FEWEST, max(FEWEST, min(MOST, self.steps // 2)))
        if family in FEW and self.guided:
            params["unguided"] = trial.suggest_int("unguided", 0, UNGUIDED)
        if family == "drift":
            params["limit"] = trial.suggest_float("limit", 0.005, 0.5, log=True)
        if family == "ledger":
            params["tolerance"] = trial.suggest_float("tolerance", 0.003, 0.5, log=True)
        if self.guided and family not in FEW:
            params["both"] = trial.suggest_float("both", 0.2, 1.0, step=0.1)
        if self.attention:
            params["attention"] = trial.suggest_categorical("attention", ["", *self.attention])
        return params

    def recipe(self, params: Params) -> Recipe:
        """The composition that `params` say. Raises `RecipeError` where its parts do not go together."""
        families = {
            "fitted": self._fitted, "plan": self._plan, "solver": self._solver, "drift": self._drift, "ledger": self._ledger, "preset": self._preset,
            "student": self._student,
        }  # fmt: skip
        made = families[params["family"]](params)
        if params.get("attention"):
            made = made | find_recipe(params["attention"])
        return made.model_copy(update={"name": self.name(params), "paper": "", "models": ()})

    def name(self, params: Params) -> str:
        """A label in words."""
        kept = {key: value for key, value in params.items() if key != "family" and value != ""}
        if params["family"] in ("preset", "student"):
            return str(kept[params["family"]])
        told = {key: round(value, 4) if isinstance(value, float) else value for key, value in kept.items()}
        parts = [str(value) if key == params["family"] else f"{key} {value}" for key, value in told.items()]  # solver: unipc, ...
        return f"{params['family']}: {', '.join(parts)}"

    # --- families ---------------------------------------------------------------------------------

    def plan(self, computed: int, both: float, forecast: int) -> Plan:
        """The best schedule with so many evaluated steps, a share `both` of them guided. Searched once each."""
        guided = max(2, round(both * computed)) if self.signals[0].scale is not None else None
        key = (computed, guided if guided is None else min(guided, computed), forecast)
        if key not in self._plans:
            end = time.monotonic() + self.thinking
            self._plans[key] = best_plan(self.signals, computed, key[1], *FORECASTS[forecast], until=lambda: time.monotonic() > end)
        return self._plans[key]

    def _plan(self, params: Params) -> Recipe:
        found = self.plan(params["computed"], params.get("both", 1.0), params["forecast"]).recipe()
        if self.guided and self.signals[0].scale is None:  # the branches could not be told apart when it was recorded
            return found.model_copy(update={"guidance": self._guidance(params, params["computed"])})
        return found

    def _solver(self, params: Params) -> Recipe:
        num = params["steps"]
        sampler = Solver(name=params["solver"], steps=num / self.steps, order=params["order"])
        return Recipe(sampler=sampler, guidance=self._thinned(num, params.get("unguided", 0)))

    def _fitted(self, params: Params) -> Recipe:
        assert self.fit is not None
        return self.fit(params["steps"], self._thinned(params["steps"], params.get("unguided", 0)))

    def _thinned(self, num: int, unguided: int) -> Guidance | None:
        """Both branches at all of `num` steps but so many: the last and every second before it, where the difference counts
        least. It is held there: few long steps are too far apart to extrapolate over (of 8 steps, holding was 7 dB better on
        tiny-flux)."""
        without = set(range(num - 1, 0, -2)[:unguided])
        if not self.guided or not without:
            return None
        return ListedGuidance(at=tuple(round(k / (num - 1), 4) for k in range(num) if k not in without), order=0)

    def _drift(self, params: Params) -> Recipe:
        rule = Drift(limit=params["limit"], accumulate=True, warmup=0.1)
        reuse = NetworkReuse(rule=rule, signal=OutputChange(), forecast=LeaveOneOut(max_order=2), correct=2)
        return Recipe(reuse=reuse, guidance=self._online(params))

    def _ledger(self, params: Params) -> Recipe:
        forecast = LeaveOneOut(min_order=1, max_order=2, damp=0.75, memory=0.5)
        reuse = NetworkReuse(rule=Ledger(tolerance=params["tolerance"]), forecast=forecast, correct=2)
        return Recipe(reuse=reuse, guidance=self._online(params))

    def _preset(self, params: Params) -> Recipe:
        return find_recipe(params["preset"])

    def _student(self, params: Params) -> Recipe:
        """Its file by its full path: the recipe is written elsewhere than the one that it came from."""
        found = find_recipe(params["student"])
        if found.adapter is None or not found.adapter.path or not found.adapter.place.exists():
            return found
        return found.model_copy(update={"adapter": found.adapter.model_copy(update={"path": str(found.adapter.place.absolute())})})

    def _guidance(self, params: Params, steps: int) -> Guidance | None:
        """Both branches at a share of `steps` steps, denser at the start, where guidance decides what is drawn."""
        num = max(2, round(params.get("both", 1.0) * steps))
        if not self.guided or num >= steps:
            return None
        return ListedGuidance(at=tuple(round((k / (num - 1)) ** 1.3, 4) for k in range(num)), order=1)

    def _online(self, params: Params) -> Guidance | None:
        """Where the evaluated steps are not known beforehand: both branches until they agree, below a share of them."""
        both = params.get("both", 1.0)
        return AdaptiveGuidance(agreement=0.999, after=round(both, 2)) if self.guided and both < 1 else None


def first_guesses(space: Space, tolerance: float) -> list[dict[str, Any]]:
    """Compositions to begin with: the controls, fitted solvers and presets, then plans whose number of evaluations the tolerance
    asks for.

    tolerance: latent error that may be reached. The number is the ledger's own rule of thumb (`Ledger.nodes`).
    """
    need = max(4.0, Ledger(tolerance=min(1.0, tolerance)).planned)
    guesses = [*_few(space, need), *({"family": "preset", "preset": name} for name in space.presets), *_plans(space, need)]
    guesses.append({"family": "ledger", "tolerance": min(0.5, max(0.003, tolerance)), "both": 1.0})
    guesses.append({"family": "drift", "limit": 0.05, "both": 1.0})
    guesses += [{"family": "student", "student": name} for name in space.adapters]
    if not space.guided:
        guesses = [{key: value for key, value in guess.items() if key not in ("both", "unguided")} for guess in guesses]
    if space.attention:
        guesses = [guess | {"attention": ""} for guess in guesses]
    return [dict(each) for each in dict.fromkeys(tuple(guess.items()) for guess in guesses)]


def _few(space: Space, need: float) -> list[dict[str, Any]]:
    """Few steps. A second-order solver needs about 0.6 of what a cache of first order does, a fitted one 0.4."""
    found: list[dict[str, Any]] = []
    for share in (0.6, 0.5, 0.7, 0.85):
        for solver in SOLVERS if share == 0.6 else SOLVERS[:1]:
            steps = _between(3, round(need * share), space.steps // 2)
            found.append({"family": "solver", "solver": solver, "steps": steps, "order": 2, "unguided": 0})
    if space.fit is not None:
        most = max(FEWEST, min(MOST, space.steps // 2))
        found += [{"family": "fitted", "steps": _between(FEWEST, round(need * share), most), "unguided": 0} for share in (0.4, 0.5)]
    return found


def _plans(space: Space, need: float) -> list[dict[str, Any]]:
    if not space.signals:
        return []
    shares = ((0.8, 0.6), (1.0, 0.6), (0.65, 0.6), (0.8, 1.0), (1.0, 1.0), (1.0, 0.4), (1.25, 0.5))
    return [
        {"family": "plan", "computed": _between(3, round(need * share), space.steps // 2), "forecast": number % 2, "both": both}
        for number, (share, both) in enumerate(shares)
    ]


def neighbours(space: Space, params: Params) -> list[dict[str, Any]]:
    """What is a little cheaper than a composition: a step less, one second branch less, or one step more for three of them.

    Of the families whose cost is known beforehand; no others have any.
    """
    family, found = params["family"], []
    if family in FEW:
        less = params.get("unguided", 0) + 1
        found = [{"steps": params["steps"] - 1}, {"unguided": less}, {"steps": params["steps"] + 1, "unguided": less + 2}]
    if family == "plan":
        found = [{"computed": params["computed"] - 1}, {"both": round(params.get("both", 1.0) - 0.1, 1)}]
    guided = [change for change in found if space.guided or not {"unguided", "both"} & set(change)]
    return [{**params, **change} for change in guided if _allowed(space, {**params, **change})]


def _allowed(space: Space, params: Params) -> bool:
    if params["family"] == "plan":
        return bool(params["computed"] >= FEWEST and params.get("both", 1.0) >= 0.2)
    most = MOST if params["family"] == "fitted" else space.steps * 2 // 3
    thin = params.get("unguided", 0)
    return bool(FEWEST <= params["steps"] <= min(most, space.steps // 2) and thin <= min(UNGUIDED, params["steps"] // 2))


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, max(low, high)))


def parts_alone(recipe: Recipe) -> dict[str, Recipe]:
    """Each axis of a composition on its own: axis -> recipe. Raises `RecipeError` for a recipe without axes."""
    if not recipe.axes:
        raise RecipeError(f"Recipe {recipe.name!r} has no axes to take apart.")
    return {axis: Recipe(name=f"{axis} alone", **{axis: part}) for axis, part in recipe.axes.items()}
