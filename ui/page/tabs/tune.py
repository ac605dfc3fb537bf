"""Tune: a study whose trials appear one by one; a point on the front is compared or exported by one click."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.errors import UsageError
from hasten.ui.engine import Engine, Job, Snapshot
from hasten.ui.page.numbers import box, read, written
from hasten.ui.page.results import Shelf
from hasten.ui.page.sentences import said
from hasten.ui.page.settings import PICTURES, Picker, students
from hasten.ui.page.watch import HIDDEN, TOLD, Updates, Watch, in_words
from hasten.ui.views.component import shown
from hasten.ui.views.front import front

NONE_YET = "Start a study: each point that appears is a recipe, tried on your prompts."
FALLBACK = ("a seven moving left, slowly", "a three moving up, quickly", "a zero moving right", "a five moving down")
"""Prompts where a model's card has not enough."""

DRAFTS = (
    "This page tunes pictures and clips. The fastest lossless way of drafting for a model that writes from left to right is searched in a"
    " terminal: hasten tune --model tiny-lm --budget lossless. What it keeps stands in Text, among those who guess."
)
"""Where the rest is."""

FEWEST = 4
"""Prompts of a study."""


class TuneTab:
    """kept: the browser's memory of jobs."""

    def __init__(self, engine: Engine, kept: gr.BrowserState) -> None:
        self.engine, self.shelf = engine, Shelf(engine)
        with gr.Row(equal_height=False, elem_classes="sides"):
            with gr.Column(scale=4, min_width=300):
                self._controls()
            with gr.Column(scale=7, min_width=320):
                self.front = shown(front({"rows": []}), elem_id="tune-front")
                self.watch = Watch(engine, "tune", kept)
                self.note = shown(said(NONE_YET))
                with gr.Column(visible=False) as self.point:
                    self.code = gr.Code("", language="yaml", label="The recipe of this point", interactive=False, max_lines=14, buttons=["copy", "download"])
                    with gr.Row(elem_classes="buttons"):
                        self.compare = gr.Button("Compare it with the plain run", variant="primary", size="sm")
                        self.use = gr.Button("Use it in Generate", size="sm")
                        self.export = gr.Button("Export this study", size="sm")
        with self.buttons:
            self.watch.stop_button()
        self._events()

    def _controls(self) -> None:
        self.picker = Picker(self.engine, PICTURES, "tune")
        with gr.Accordion("A language model instead?", open=False):
            shown(said(DRAFTS))
        self.prompts = gr.Textbox(
            "\n".join(self.examples(self.picker.cards()[0].id)), label="Prompts, one in a line", lines=6, max_lines=14, elem_id="tune-prompts",
            info="Four or more. Every third is held out: the result is checked on those.",
        )  # fmt: skip
        self.budget = gr.Slider(20, 50, value=30, step=1, label="Likeness to keep", info="PSNR in dB against the plain run, in the worst case", buttons=[])
        self.seconds = gr.Number(300, label="Seconds to search", minimum=1, maximum=self.engine.limits.max_seconds, min_width=120)
        self.steps = box("Steps of a run", elem_id="tune-steps")
        self.students = gr.Dropdown(
            students(self.engine), value=[], label="Students to try, too", multiselect=True, max_choices=self.engine.limits.max_recipes,
            visible=bool(students(self.engine)), info="Made by trainings here; they draw other pictures than the plain run, so few keep a likeness.",
        )  # fmt: skip
        with gr.Row(elem_classes="buttons") as self.buttons:
            self.run = gr.Button("Find the fastest recipe", variant="primary", elem_classes="go", elem_id="tune-run")

    def _events(self) -> None:
        self.found = gr.State({})
        self.chosen = gr.State({})
        self.watch.show([self.front, self.note, self.point, self.code, self.found, self.chosen], self.running, self.over)
        self.watch.starts(self.run.click, self.request, [self.picker.model, self.prompts, self.budget, self.seconds, self.steps, self.students])
        self.picker.model.input(in_words(self.other_model), [self.picker.model], [*self.picker.parts, self.prompts], **TOLD)
        self.front.select(self.choose, [self.found], [self.note, self.point, self.code, self.chosen], queue=False, **HIDDEN)

    # --- handlers ---------------------------------------------------------------------------------

    def request(self, model: str, prompts: str, budget: float, seconds: float | None, steps: str, tried: list[str] | None) -> dict[str, Any]:
        """What Start asks for."""
        count = read("steps", steps)
        more = {"students": list(tried or []), **({"steps": count} if count is not None else {})}
        lines = [line.strip() for line in (prompts or "").splitlines() if line.strip()]
        return {"kind": "tune", "model": model, "prompts": lines, "budget": f"psnr>={budget:g}", "seconds": float(seconds or 300), **more}

    def filled(self, asked: dict[str, Any]) -> Updates:
        """The controls as a request has them."""
        budget = str(asked.get("budget", "")).removeprefix("psnr>=")
        return {
            self.picker.model: self.picker.card(asked["model"]).id, self.prompts: "\n".join(asked["prompts"]),
            self.budget: float(budget) if budget.replace(".", "").isdigit() else 30, self.seconds: asked.get("seconds", 300),
            self.steps: written(asked.get("steps")), self.students: self.offered(asked.get("students") or []), **self.picker.updates(asked["model"]),
        }  # fmt: skip

    def offered(self, tried: list[str] | None = None) -> Any:
        """The students as they are now. tried: those to be chosen; None leaves that as it is. Raises `UsageError` for one that is gone."""
        found = students(self.engine)
        if gone := next((name for name in tried or () if name not in [each for _, each in found]), None):
            raise UsageError(f"It was made with {gone!r}, a student that is not here any more. Train it again, or leave it out.")
        chosen: dict[str, Any] = {"value": tried} if tried is not None else {}
        return gr.update(choices=found, visible=bool(found), **chosen)

    @property
    def fills(self) -> list[Component]:
        """All that `filled` updates."""
        return [self.picker.model, *self.picker.parts, self.prompts, self.budget, self.seconds, self.steps, self.students]

    def other_model(self, model: str) -> Updates:
        return {**self.picker.updates(model), self.prompts: "\n".join(self.examples(model))}

    def running(self, snapshot: Snapshot) -> Updates:
        trials = snapshot.data.get("trials") or []
        note = snapshot.note or (NONE_YET if not trials else f"{sum(bool(t.get('kept')) for t in trials)} of {len(trials)} trials keep the budget so far.")
        budget = _budget(self.engine.job(snapshot.job).asked)
        shape = {self.front: front({"rows": rows(trials), "budget": budget})} if trials else {}
        return {**shape, self.note: said(note), self.point: gr.update(visible=False)}

    def over(self, job: Job) -> Updates:
        return self.shown(self.shelf.result(job.result["output"]))

    def shown(self, found: dict[str, Any]) -> Updates:
        """A study that is done, also one of the history: its best recipe is chosen."""
        recipe = found.get("recipe")
        sentence = " ".join(found.get("sentences") or []) or ("" if recipe else "Nothing kept the budget. Lower it, or search longer.")
        kept = {"output": found["output"], "trials": found["trials"], "model": found["request"]["model"], "prompt": found["request"]["prompts"][0], "steps": found["request"].get("steps")}
        return {
            self.front: front({"rows": rows(found["trials"]), "budget": _budget(found["request"])}), self.note: said(sentence, "good" if recipe else "note"),
            self.point: gr.update(visible=recipe is not None), self.code: recipe or "", self.found: kept, self.chosen: self._asking(kept, recipe),
        }  # fmt: skip

    def choose(self, found: dict[str, Any], event: gr.EventData) -> tuple[Any, ...]:
        """A point of the plot: its recipe, where the study is done."""
        number = int(event.number)
        trial = next((each for each in found.get("trials", ()) if each["number"] == number), None)
        if trial is None or not trial.get("recipe"):
            return said("Its recipe can be used when the study is over."), gr.update(visible=False), "", {}
        words = f"Trial {number}: {trial['name']}." + (f" {trial['note']}" if trial.get("note") else "")
        return said(words), gr.update(visible=True), trial["recipe"], self._asking(found, trial["recipe"])

    def compared(self, asking: dict[str, Any]) -> dict[str, Any]:
        """The comparison that a point asks for."""
        if not asking:
            raise UsageError("Choose a point first.")
        return {"kind": "compare", **{key: value for key, value in asking.items() if key != "recipe"}, "recipes": [asking["recipe"]]}

    def used(self, asking: dict[str, Any]) -> dict[str, Any]:
        """The same for Generate."""
        if not asking:
            raise UsageError("Choose a point first.")
        return {"kind": "generate", **asking}

    def _asking(self, found: dict[str, Any], recipe: str | None) -> dict[str, Any]:
        if recipe is None:
            return {}
        steps = {"steps": found["steps"]} if found.get("steps") is not None else {}
        return {"model": found["model"], "prompt": found["prompt"], "recipe": recipe, **steps}

    def examples(self, model: str) -> list[str]:
        """Prompts for a study of a model: its own, and more where those are too few."""
        own = self.picker.card(model).prompts
        return list(dict.fromkeys((*own, *FALLBACK) if len(own) < FEWEST else own))[:6]


def rows(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials as rows of the front."""
    return [
        {"number": trial["number"], "recipe": trial["name"], "speedup": trial["speedup"], "psnr_median": trial["worst"]}
        for trial in trials if trial.get("worst") is not None
    ]  # fmt: skip


def _budget(asked: dict[str, Any]) -> float | None:
    words = str(asked.get("budget", "psnr>=30")).removeprefix("psnr>=")
    return float(words) if words.replace(".", "").isdigit() else None
