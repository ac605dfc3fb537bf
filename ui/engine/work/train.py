"""A training: `hasten train METHOD`, with its loss and pictures seen while it runs, and a clean stop with a checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import StoppedError
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.report import Report
from hasten.ui.engine.request import Train
from hasten.ui.engine.work.study import folder_of

if TYPE_CHECKING:
    from hasten.recipe import Recipe

POINTS = 400
"""Of a loss's curve, at most."""

LOOKED = 1.0
"""Seconds between two looks at the log."""

SHEETS = 6
"""Sheets of pictures over a training, where the settings do not say."""


def train(ask: Train, desk: Desk, report: Report) -> dict[str, Any]:
    """Result: {"output", "loss", "samples", "steps", "step", "finished", "student", "recipe", "drafts"}; recipe: what names the
    student in a request, None where it is not finished, or a whole network of its own, which no recipe brings along. drafts: it is
    one that guesses tokens for its model.

    Told to stop, or out of time, it ends behind a step, with a checkpoint: the same request goes on from there.
    """
    from hasten.distill.train_config import load_config
    from hasten.distill.training import train as service
    from hasten.pipelines.loading import silence

    silence()
    folder = folder_of(desk.place, ask)
    config = load_config(ask.method, None, settings(ask, desk))
    watch = _Watch(folder, report, config.train.steps, ask.minutes)
    report.phase(f"Preparing {ask.method}")
    finished = True
    try:
        service(config, folder, resume=(folder / "config.json").is_file(), progress=False, say=report.note, ended=watch.ended)
    except StoppedError as stopped:
        finished = False
        report.note(str(stopped))
    watch.look()
    if not watch.timely:
        report.check()  # it was told to stop, and has its checkpoint
    return _kept(ask, desk, folder, watch, finished)


def settings(ask: Train, desk: Desk) -> dict[str, Any]:
    """What the configuration is made of. Sheets of pictures are drawn unless the settings say otherwise."""
    from hasten.distill.train_config import methods
    from hasten.errors import UsageError, nearest

    if ask.method not in methods():
        raise UsageError(f"There is no method {ask.method!r}; there are {', '.join(methods())}.{nearest(ask.method, methods())}")
    given: dict[str, Any] = {"model": desk.models.source(ask.model), **ask.settings}
    if ask.prompts:
        given["data.prompts"] = list(ask.prompts)
    if desk.models.card(ask.model).kind in ("image", "video"):
        steps = given.get("train.steps", 1000)
        given.setdefault("train.samples_every", max(1, int(steps) // SHEETS))
    return given


class _Watch:
    """Looks at a training's folder while it runs, and says when it is to end."""

    def __init__(self, folder: Path, report: Report, steps: int, minutes: float) -> None:
        self.folder, self.report, self.steps = folder, report, steps
        self.loss: list[list[float]] = []
        self.step, self.timely = 0, False
        self._until = time.monotonic() + 60 * minutes
        self._looked, self._begun, self._place = 0.0, False, 0

    def ended(self) -> bool:
        """Asked by the trainer after each step."""
        now = time.monotonic()
        self.timely = now > self._until and not self.report.stopped()
        if now - self._looked > LOOKED:
            self._looked = now
            self.look()
        return self.timely or self.report.stopped()

    def look(self) -> None:
        """Read what the log has got since, and tell it."""
        self._read()
        if not self._begun and self.step:
            self._begun = True
            if not self.report.stopped():
                self.report.phase("Training", self.steps, self.step)
        pictures = sorted(file.name for file in (self.folder / "samples").glob("*.png"))
        self.report.data(loss=thinned(self.loss), samples=pictures)
        self.report.step(self.step, self.steps)

    def _read(self) -> None:
        """The log's whole lines behind where it was read last."""
        try:
            with (self.folder / "log.jsonl").open("rb") as file:
                file.seek(self._place)
                new = file.read()
        except OSError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.splitlines():
            row = json.loads(line)
            self.step = int(row["step"]) + 1
            if "loss" in row:
                self.loss.append([row["step"], row["loss"]])


def thinned(points: list[list[float]]) -> list[list[float]]:
    """At most `POINTS` of them: means of neighbours."""
    if len(points) <= POINTS:
        return points
    group = -(-len(points) // POINTS)
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [[part[-1][0], sum(value for _, value in part) / len(part)] for part in parts]


def _kept(ask: Train, desk: Desk, folder: Path, watch: _Watch, finished: bool) -> dict[str, Any]:
    """The result: curve, pictures, and the student. Recipes may name it from now on, unless it is a whole network."""
    sheets = sorted((folder / "samples").glob("*.png"))
    with desk.outputs.making(ask) as out:
        student = finished and (folder / "student").is_dir()
        if student:
            shutil.copytree(folder / "student", out.folder / "student")
        for sheet in sheets:
            out.copy(sheet, f"sample-{sheet.name}")
        axes = _recipe_of(ask, out.folder / "student").axes if student else {}
        usable = not axes.keys().isdisjoint(("adapter", "draft"))
        out.facts = {
            "loss": thinned(watch.loss), "samples": [f"sample-{sheet.name}" for sheet in sheets], "steps": watch.steps, "step": watch.step,
            "finished": finished, "student": student, "recipe": f"trained:{out.id}" if usable else None, "model": ask.model,
            "drafts": "draft" in axes,
        }  # fmt: skip
    return {"output": out.id, **out.facts}


def _recipe_of(ask: Train, student: Path) -> Recipe:
    """The recipe of a student, in its folder: one that guesses tokens gets that of the drafter that reads what its training writes."""
    from hasten.atomic import atomic_write
    from hasten.pipelines.recipes import catalogue
    from hasten.recipe import Recipe, read
    from hasten.samplers.drafters_own.student import Student

    file = student / "recipe.yaml"
    for entry in catalogue():
        part = entry.recipe.draft
        if isinstance(part, Student) and part.training == ask.method:
            made = entry.recipe.model_copy(update={"draft": part.model_copy(update={"path": "."}), "models": (ask.model,)})
            atomic_write(file, made.to_yaml())
    return read(file) if file.is_file() else Recipe()
