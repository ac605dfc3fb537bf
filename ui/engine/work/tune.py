"""A study: `hasten tune`, whose trials are seen while it runs, and which is gone on with when it is asked for again."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.recipes import portable
from hasten.ui.engine.report import Report
from hasten.ui.engine.request import Tune
from hasten.ui.engine.work.generate import check_pictures
from hasten.ui.engine.work.study import folder_of

if TYPE_CHECKING:
    from hasten.pipelines.tune.goal import Goal
    from hasten.pipelines.tune.job import Job
    from hasten.pipelines.tune.run import Tuning
    from hasten.pipelines.tune.study import Trial
    from hasten.recipe import Recipe


def tune(ask: Tune, desk: Desk, report: Report) -> dict[str, Any]:
    """Result: {"output", "trials", "rows", "recipe", "sentences", "noise_floor", "plain_seconds", "budget"}; recipe: YAML text, None
    where nothing kept the budget. trials as in `Snapshot.data`, with `recipe` (YAML), `nfe` and `front`."""
    from hasten.pipelines.generate import Prompt, Request, plan
    from hasten.pipelines.tune.goal import Goal
    from hasten.pipelines.tune.job import Job

    goal = Goal.read(ask.budget)
    folder = folder_of(desk.place, ask)
    with desk.pipeline(ask.model, None, report) as pipe:
        check_pictures(pipe, ask.model)
        pairs = tuple((text, number) for number, text in enumerate(ask.prompts))
        asked = Request(
            tuple(Prompt(text, seed, seed) for text, seed in pairs), steps=ask.steps, height=ask.height, width=ask.width, frames=ask.frames,
            guidance=ask.guidance,
        )  # fmt: skip
        call = {key: value for key, value in plan(pipe, asked, desk.limits).items() if key != "output_type"}
        job = Job(goal, pairs, call, ask.seconds, ask.model, adapters=_students(ask, desk), seed=ask.seed)
        report.phase("Searching")
        with _Clock(report, ask.seconds):
            return _searched(ask, desk, report, pipe, job, goal, folder)


def _students(ask: Tune, desk: Desk) -> tuple[str, ...]:
    """Files of the students that are to be tried. Raises `RecipeError` for one that is not here."""
    known = desk.outputs.trained()
    for student in ask.students:
        desk.recipe(student)
    return tuple(str(known[student.partition(":")[2]]) for student in ask.students)


def _searched(ask: Tune, desk: Desk, report: Report, pipe: Any, job: Job, goal: Goal, folder: Path) -> dict[str, Any]:
    from hasten.errors import OutputError
    from hasten.pipelines.tune import kept

    trials: list[dict[str, Any]] = []

    def seen(trial: Trial) -> None:
        trials.append(point(trial, goal))
        report.data(trials=trials[-400:])

    def written(recipe: Recipe) -> str:
        return portable(recipe, desk.outputs.trained()).to_yaml()

    tuning = _tuning(pipe, job, folder, report.note, seen)
    for trial in tuning.study.trials():  # of an earlier start of the same study
        seen(trial)
    found = tuning.run()
    notes: list[str] = []
    if found.recipe is not None:
        try:
            kept.keep(found.recipe)
        except OutputError as error:  # a folder that cannot be written must not cost the result of a search
            notes.append(f"It is not kept for budgets: {error}")
    front = {trial.number for trial in found.front}
    points = [point(trial, goal) | {"recipe": written(trial.recipe), "front": trial.number in front} for trial in found.trials]
    with desk.outputs.making(ask) as out:
        recipe = written(found.recipe) if found.recipe is not None else None
        if recipe is not None:
            out.text("recipe.yaml", recipe)
        out.facts = {
            "trials": points, "rows": found.rows(), "recipe": recipe, "sentences": [*found.sentences(), *notes], "noise_floor": found.noise_floor,
            "plain_seconds": found.plain_seconds, "budget": str(goal),
            "given_up": [{"name": name, "note": why} for name, why in found.given_up],
        }  # fmt: skip
    return {"output": out.id, **out.facts}


def point(trial: Trial, goal: Goal) -> dict[str, Any]:
    """One point of the plot; None for what is infinite or not known."""
    measured = trial.measured
    worst = measured.worst(goal) if measured.outcomes else math.nan
    return {
        "number": trial.number, "name": measured.name, "speedup": measured.speedup if measured.outcomes else None,
        "worst": worst if math.isfinite(worst) else None, "kept": measured.kept(goal), "note": measured.why,
    }  # fmt: skip


def _tuning(pipe: Any, job: Job, folder: Path, say: Callable[[str], None], seen: Callable[[Trial], None]) -> Tuning:
    """Imported when it is needed: it takes seconds."""
    try:
        from hasten.pipelines.tune.run import Tuning

        return Tuning(pipe, job, folder, say, seen)
    except ModuleNotFoundError as error:
        raise UsageError(f"Tuning needs {error.name}. pip install 'hasten[tune]'.") from error


class _Clock:
    """Tells once a second how much of the time is left: trials are slower than that."""

    def __init__(self, report: Report, seconds: float) -> None:
        self._report, self._seconds = report, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="hasten-clock", daemon=True)

    def _tick(self) -> None:
        began = time.monotonic()
        while not self._over.wait(1.0):
            self._report.left(self._seconds - (time.monotonic() - began), self._seconds)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
