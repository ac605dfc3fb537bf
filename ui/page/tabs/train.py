"""Train: a student that needs fewer calls. Its loss and its pictures are seen while it learns; then it is a recipe here."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.errors import UsageError
from hasten.ui.engine import Engine, Job, Snapshot
from hasten.ui.page.numbers import box, read, written
from hasten.ui.page.results import Shelf, data_url, url
from hasten.ui.page.sentences import said
from hasten.ui.page.settings import PICTURES, Picker
from hasten.ui.page.watch import TOLD, Updates, Watch, in_words
from hasten.ui.views.component import shown
from hasten.ui.views.loss import loss

METHODS = [
    ("Pairs: what the teacher makes", "pairs"), ("Consistency (LCM)", "lcm"), ("Consistency, small (LCM-LoRA)", "lcm-lora"),
    ("Consistency without steps (sCM)", "scm"), ("Mean velocities (MeanFlow)", "meanflow"), ("Guidance in one call", "guidance"),
    ("Half the steps, stage by stage", "progressive"), ("Distribution matching (DMD2)", "dmd"),
]  # fmt: skip
"""Those that need nothing but prompts; `hasten train` has more."""

GUESSING = [("Heads that guess (Medusa)", "medusa"), ("Prompt tokens that guess (PPD)", "ppd"), ("Masks that guess (multi-token)", "mtp")]
"""The same for models that write from left to right: their students guess tokens, which the model checks."""

SETTINGS = ("train.steps", "train.batch", "train.lr", "student.rank", "data.count")
"""Settings that have a box, in their order."""

SHEETS = 4
"""Newest sheets of pictures that are shown while it runs."""

DONE = "The student is ready: it is a recipe now, in Generate and everywhere else."
GUESSES = "The student is ready: in Text it stands among those who guess for {model}."
WHOLE = "It is trained: a whole network, which no recipe can bring along. The README.md in its folder says how to load it."
TRAINED = "It is trained; this method makes no student that a recipe can bring along."
UNFINISHED = "Time was up before the last step. The same training goes on from its checkpoint."


class TrainTab:
    """kept: the browser's memory of jobs."""

    def __init__(self, engine: Engine, kept: gr.BrowserState) -> None:
        self.engine, self.shelf = engine, Shelf(engine)
        with gr.Row(equal_height=False, elem_classes="sides"):
            with gr.Column(scale=4, min_width=300):
                self._controls()
            with gr.Column(scale=7, min_width=320):
                self.plot = shown(loss({}), elem_id="train-plot")
                self.watch = Watch(engine, "train", kept)
                self.note = shown(said("A student learns from the model itself; your prompts are all it needs."))
                with gr.Row(visible=False, elem_classes="buttons") as self.next:
                    self.use = gr.Button("Use the student in Generate", variant="primary", size="sm")
                    self.compare = gr.Button("Compare it with the model", size="sm")
                    self.tune = gr.Button("Try it in a study", size="sm")
        with self.buttons:
            self.watch.stop_button()
        self._events()

    def _controls(self) -> None:
        self.picker = Picker(self.engine, (*PICTURES, "language"), "train")
        self.method = gr.Dropdown(METHODS, value="pairs", label="Method", allow_custom_value=True, elem_id="train-method")
        self.prompts = gr.Textbox(
            "", label="Prompts, one in a line", lines=4, max_lines=14, placeholder="empty: the model's own", elem_id="train-prompts"
        )
        with gr.Row():
            self.minutes = gr.Number(10, label="Minutes at most", minimum=0.01, maximum=self.engine.limits.max_minutes, min_width=110)
            self.steps = box("Steps", "1000")
        with gr.Accordion("Advanced", open=False), gr.Row():
            self.batch, self.rate = box("Batch"), box("Learning rate")
            self.rank, self.count = box("LoRA rank"), box("Pairs to store")
        with gr.Row(elem_classes="buttons") as self.buttons:
            self.run = gr.Button("Train", variant="primary", elem_classes="go", elem_id="train-run")

    def _events(self) -> None:
        self.student = gr.State({})
        self.watch.show([self.plot, self.note, self.next, self.student], self.running, self.over)
        self.watch.starts(self.run.click, self.request, [self.picker.model, self.method, self.prompts, self.minutes, *self._settings])
        self.picker.model.input(in_words(self.other_model), [self.picker.model, self.method], [*self.picker.parts, self.method], **TOLD)

    @property
    def _settings(self) -> list[Component]:
        return [self.steps, self.batch, self.rate, self.rank, self.count]

    # --- handlers ---------------------------------------------------------------------------------

    def request(self, model: str, method: str, prompts: str, minutes: float | None, *values: str) -> dict[str, Any]:
        """What Train asks for."""
        numbers = {name: read(name, typed, whole=name != "train.lr") for name, typed in zip(SETTINGS, values, strict=True)}
        lines = [line.strip() for line in (prompts or "").splitlines() if line.strip()]
        return {
            "kind": "train", "method": method or "", "model": model, "prompts": lines, "minutes": float(minutes or 10),
            "settings": {name: value for name, value in numbers.items() if value is not None},
        }  # fmt: skip

    def filled(self, asked: dict[str, Any]) -> Updates:
        """The controls as a request has them; settings that have no control are left out."""
        given = asked.get("settings") or {}
        return {
            self.picker.model: self.picker.card(asked["model"]).id, **self.picker.updates(asked["model"]),
            self.method: gr.update(choices=self._methods(asked["model"]), value=asked["method"]),
            self.prompts: "\n".join(asked.get("prompts") or ()), self.minutes: asked.get("minutes", 10),
            **{each: written(given.get(name)) for name, each in zip(SETTINGS, self._settings, strict=True)},
        }  # fmt: skip

    @property
    def fills(self) -> list[Component]:
        """All that `filled` updates."""
        return [self.picker.model, *self.picker.parts, self.method, self.prompts, self.minutes, *self._settings]

    def other_model(self, model: str, method: str) -> Updates:
        """What follows from another model: the methods for its kind, the chosen one among them where it is one."""
        found = self._methods(model)
        value = method if method in [name for _, name in found] else found[0][1]
        return {**self.picker.updates(model), self.method: gr.update(choices=found, value=value)}

    def _methods(self, model: str) -> list[tuple[str, str]]:
        return GUESSING if self.picker.card(model).kind == "language" else METHODS

    def running(self, snapshot: Snapshot) -> Updates:
        """The curve so far, and the newest pictures."""
        points = snapshot.data.get("loss") or []
        sheets = [self._sheet(snapshot.job, name) for name in (snapshot.data.get("samples") or [])[-SHEETS:]]
        note = said(snapshot.note or "It learns. Stop keeps a checkpoint, from which the same training goes on.")
        return {
            self.note: note, self.next: gr.update(visible=False),
            **({self.plot: loss({"rows": _rows(points), "samples": [sheet for sheet in sheets if sheet]})} if points or sheets else {}),
        }  # fmt: skip

    def over(self, job: Job) -> Updates:
        """What it gave; one that had too little time is gone on with by one click."""
        more: Updates = {}
        if not job.result.get("finished", True):
            watch = self.watch
            more = {watch.row: gr.update(visible=True), watch.remedies[0]: gr.update(value="Go on with it", visible=True), watch.asked: [job.asked]}
        return {**self.shown(self.shelf.result(job.result["output"])), **more}

    def shown(self, found: dict[str, Any]) -> Updates:
        """A training that is over, also one of the history."""
        sheets = [{"step": step_of(name), "url": url(self.shelf.file(found["output"], name))} for name in found.get("samples") or ()]
        recipe, draws = found.get("recipe"), not found.get("drafts")
        prompts = found["request"].get("prompts") or self.picker.card(found["model"]).prompts or ("a seven moving left, slowly",)
        return {
            self.plot: loss({"rows": _rows(found["loss"]), "samples": sheets}), self.next: gr.update(visible=recipe is not None and draws),
            self.note: said(self._words(found) if recipe else UNFINISHED if not found.get("finished") else WHOLE if found.get("student") else TRAINED, "good" if recipe else "note"),
            self.student: {"model": found["model"], "prompt": prompts[0], "recipe": recipe} if recipe and draws else {},
        }  # fmt: skip

    def _words(self, found: dict[str, Any]) -> str:
        """Of a student that a recipe may name."""
        return GUESSES.format(model=found["model"]) if found.get("drafts") else DONE

    def used(self, student: dict[str, Any]) -> dict[str, Any]:
        """What Generate is to ask for."""
        if not student:
            raise UsageError("There is no student yet.")
        return {"kind": "generate", **student}

    def compared(self, student: dict[str, Any]) -> dict[str, Any]:
        """What Compare is to ask for."""
        asked = self.used(student)
        return {"kind": "compare", "model": asked["model"], "prompt": asked["prompt"], "recipes": [asked["recipe"]]}

    def studied(self, student: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
        """What Tune is to ask for on these prompts."""
        asked = self.used(student)
        return {"kind": "tune", "model": asked["model"], "prompts": prompts, "students": [asked["recipe"]]}

    def _sheet(self, job: str, name: str) -> dict[str, Any] | None:
        try:
            return {"step": step_of(name), "url": data_url(self.engine.sample(job, name).read_bytes())}
        except (UsageError, OSError):  # it was there a moment ago
            return None


def step_of(name: str) -> int:
    """The step in the name of a sheet of pictures; 0 where there is none."""
    digits = "".join(letter if letter.isdigit() else " " for letter in name).split()
    return int(digits[-1]) if digits else 0


def _rows(points: list[list[float]]) -> list[dict[str, Any]]:
    return [{"step": step, "loss": value} for step, value in points]
