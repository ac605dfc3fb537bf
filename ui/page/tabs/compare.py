"""Compare, the front page: the same noise plain and with recipes, side by side, and what was left out."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.ui.engine import Engine, Job, Snapshot
from hasten.ui.page.results import Shelf, compared
from hasten.ui.page.sentences import headline
from hasten.ui.page.settings import Settings, Speed, recipe_choices
from hasten.ui.page.speed import USUAL
from hasten.ui.page.watch import HIDDEN, TOLD, Updates, Watch, in_words
from hasten.ui.views.component import shown
from hasten.ui.views.density import density
from hasten.ui.views.metrics import metrics
from hasten.ui.views.player import player
from hasten.ui.views.timeline import timeline

PROMPT = "a seven moving left, slowly"


class CompareTab:
    """kept: the browser's memory of jobs."""

    def __init__(self, engine: Engine, kept: gr.BrowserState) -> None:
        self.engine, self.shelf = engine, Shelf(engine)
        with gr.Row(equal_height=False, elem_classes="sides"):
            with gr.Column(scale=6, min_width=320):
                self.player = shown(player({}), elem_id="compare-player")
            with gr.Column(scale=5, min_width=300):
                self._controls(kept)
        self.metrics = shown(visible=False)
        self.which = gr.Radio([], label="What was left out, and where", visible=False, elem_classes="which")
        self.timeline, self.density = shown(visible=False), shown(visible=False)
        self._events()

    def _controls(self, kept: gr.BrowserState) -> None:
        self.headline = shown(headline("The first comparison is on its way", "It takes about half a minute, and no download."))
        self.settings = Settings(self.engine, "compare")
        self.speed = Speed(self.engine, "tiny-video", "video", lowest=1)
        with gr.Row(elem_classes="buttons") as buttons:
            self.run = gr.Button("Run again", variant="primary", elem_classes="go", elem_id="compare-run")
        self.watch = Watch(self.engine, "compare", kept)
        with buttons:
            self.watch.stop_button()
        with gr.Accordion("Advanced", open=False):
            self.settings.main(PROMPT)
            self.more = gr.Dropdown(
                self.choices(), label="Compare these instead", multiselect=True, allow_custom_value=True,
                max_choices=self.engine.limits.max_recipes, info="Empty: the one that the slider names.",
            )  # fmt: skip
            self.repeats = gr.Number(
                1, label="Times each run is timed", precision=0, minimum=1, maximum=self.engine.limits.max_repeats, elem_id="compare-repeats",
                info="In turns, and the median counts; more than once where the machine is busy or the difference small.",
            )  # fmt: skip
            self.settings.advanced()

    def _events(self) -> None:
        self.result = gr.State({})
        model = self.settings.picker.model
        own = [self.player, self.metrics, self.which, self.timeline, self.density, self.headline, self.result, model, *self.settings.picker.parts]
        self.watch.show(own, self.running, self.over)
        self.watch.starts(self.run.click, self.request, [self.speed.slider, self.more, self.repeats, *self.settings.inputs])
        self.watch.starts(self.settings.picker.fetch.click, download, [model])
        self.which.input(self.left_out, [self.result, self.which], [self.timeline, self.density], queue=False, **HIDDEN)
        self.speed.slider.input(self.slid, [self.speed.slider, model], [self.speed.words], queue=False, **HIDDEN)
        model.input(
            in_words(self.other_model), [model, self.settings.prompt], [*self.settings.outputs, *self.speed_parts], **TOLD
        )

    @property
    def speed_parts(self) -> list[Component]:
        return [self.speed.slider, self.speed.words]

    # --- handlers ---------------------------------------------------------------------------------

    def request(self, place: float, more: list[str] | None, repeats: int | None, *values: Any) -> dict[str, Any]:
        """What Run asks for."""
        asked = self.settings.request(*values)
        return {"kind": "compare", **asked, "repeats": int(repeats or 1), "recipes": list(more or []) or [self.speed.recipe(place, asked["model"])]}

    def filled(self, asked: dict[str, Any]) -> Updates:
        """The controls as a request has them."""
        recipes = list(asked.get("recipes") or [asked.get("recipe", "balanced")])
        alone = len(recipes) == 1 and recipes[0] in [level.recipe for level in self.speed.levels(asked["model"])]
        return {
            **self.settings.filled(asked), **self.speed.updates(asked["model"], recipes[0]), self.repeats: asked.get("repeats", 1),
            self.more: gr.update(choices=self.choices(), value=[] if alone else [name for name in recipes if name != "plain"]),
        }  # fmt: skip

    def choices(self) -> list[tuple[str, str]]:
        """Recipes as they are now: a training may have made another one."""
        return recipe_choices(self.engine, "video")[1:]

    @property
    def fills(self) -> list[Component]:
        """All that `filled` updates."""
        return [*self.settings.outputs, *self.speed_parts, self.more, self.repeats]

    def other_model(self, model: str, prompt: str) -> Updates:
        return {**self.settings.for_model(model, prompt), **self.speed.updates(model, self.speed.recipe(USUAL, model))}

    def slid(self, place: float, model: str) -> Any:
        return self.speed.updates(model, self.speed.recipe(place, model))[self.speed.words]

    def running(self, snapshot: Snapshot) -> Updates:
        """Each run's time as it is done. The last comparison stays in sight until the new one is whole."""
        rows = snapshot.data.get("rows") or []
        return {self.metrics: gr.update(value=metrics({"rows": rows}), visible=True)} if rows else {}

    def over(self, job: Job) -> Updates:
        """Everything of a comparison."""
        if job.kind == "download":
            return self.settings.picker.looked_again(job.asked["model"])
        return self.shown(self.shelf.result(job.result["output"])) if "runs" in job.result else {}

    def shown(self, found: dict[str, Any]) -> Updates:
        """A comparison that is whole, also one of the history."""
        names = [run["recipe"] for run in found["runs"][1:]]
        first = names[0] if names else "plain"
        line, strip = self.left_out(found, first)
        return {
            self.player: player(self.shelf.player(found)), self.metrics: gr.update(value=metrics(self.shelf.metrics(found)), visible=True),
            self.which: gr.update(choices=names, value=first, visible=len(names) > 1), self.timeline: line, self.density: strip,
            self.headline: compared(found, found["request"]["prompt"]), self.result: {"output": found["output"], "runs": found["runs"]},
        }  # fmt: skip

    def left_out(self, found: dict[str, Any], recipe: str) -> tuple[Any, Any]:
        """Timeline and density of one run."""
        trace = self.shelf.trace(found, recipe) if found.get("runs") else {}
        return gr.update(value=timeline(trace), visible=True), gr.update(value=density(trace), visible=True)


def download(model: str) -> dict[str, Any]:
    """What the button beside a model that is not here asks for."""
    return {"kind": "download", "model": model}
