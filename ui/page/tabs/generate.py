"""Generate: one picture or clip, as large as there is room, with everything that was left out."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.ui.engine import Engine, Job, Snapshot
from hasten.ui.page.results import Shelf, generated
from hasten.ui.page.sentences import waiting
from hasten.ui.page.settings import Settings, Speed, as_yaml, checked, recipe_choices
from hasten.ui.page.speed import USUAL
from hasten.ui.page.tabs.compare import download
from hasten.ui.page.watch import HIDDEN, TOLD, Updates, Watch, in_words
from hasten.ui.views.component import shown
from hasten.ui.views.density import density
from hasten.ui.views.timeline import timeline

PROMPT = "a three moving up, quickly"


class GenerateTab:
    """kept: the browser's memory of jobs."""

    def __init__(self, engine: Engine, kept: gr.BrowserState) -> None:
        self.engine, self.shelf = engine, Shelf(engine)
        with gr.Row(equal_height=False, elem_classes="sides"):
            with gr.Column(scale=5, min_width=300):
                self._controls()
            with gr.Column(scale=6, min_width=320):
                self.picture = shown(waiting("Your picture or clip appears here."), elem_id="generate-result")
                self.watch = Watch(engine, "generate", kept)
                self.facts = shown()
                with gr.Row(visible=False, elem_classes="buttons") as self.next:
                    self.compare = gr.Button("Compare with the plain run", size="sm")
                    self.export = gr.Button("Export this", size="sm")
        with self.buttons:
            self.watch.stop_button()
        self.timeline, self.density = shown(visible=False), shown(visible=False)
        self._events()

    def _controls(self) -> None:
        self.settings = Settings(self.engine, "generate")
        self.settings.main(PROMPT)
        self.speed = Speed(self.engine, "tiny-video", "video")
        with gr.Row(elem_classes="buttons") as self.buttons:
            self.run = gr.Button("Generate", variant="primary", elem_classes="go", elem_id="generate-run")
        with gr.Accordion("Advanced", open=False):
            self.recipe = gr.Dropdown(
                self.choices(), value="balanced", label="Recipe", allow_custom_value=True, elem_id="generate-recipe",
                info="Named after its paper; a name may carry arguments, such as easycache:limit=0.1",
            )  # fmt: skip
            self.settings.advanced()
            with gr.Accordion("Edit the recipe", open=False):
                self.state = shown(checked(self.engine, ""))
                self.edited = gr.Code("", language="yaml", label="Recipe as YAML", lines=8, max_lines=24, interactive=True, elem_id="generate-yaml")
                with gr.Row(elem_classes="buttons"):
                    self.edit = gr.Button("Begin with the recipe chosen above", size="sm")
                    self.clear = gr.Button("Discard", size="sm")

    def _events(self) -> None:
        self.output = gr.State("")
        model = self.settings.picker.model
        own = [self.picture, self.facts, self.next, self.timeline, self.density, self.output, model, *self.settings.picker.parts]
        self.watch.show(own, self.running, self.over)
        self.watch.starts(self.run.click, self.request, [self.recipe, self.edited, *self.settings.inputs])
        self.watch.starts(self.settings.picker.fetch.click, download, [model])
        self.speed.slider.input(self.slid, [self.speed.slider, model], [self.recipe, self.speed.words], queue=False, **HIDDEN)
        self.recipe.input(self.chosen, [self.recipe, model], self.speed_parts, queue=False, **HIDDEN)
        model.input(
            in_words(self.other_model), [model, self.settings.prompt], [*self.settings.outputs, *self.speed_parts, self.recipe], **TOLD
        )
        self.edited.change(self.check, [self.edited], [self.state], queue=False, trigger_mode="always_last", **HIDDEN)
        self.edit.click(in_words(self.written), [self.recipe], [self.edited], **TOLD)
        self.clear.click(lambda: "", None, [self.edited], queue=False, **HIDDEN)

    @property
    def speed_parts(self) -> list[Component]:
        return [self.speed.slider, self.speed.words]

    # --- handlers ---------------------------------------------------------------------------------

    def request(self, recipe: str, edited: str | None, *values: Any) -> dict[str, Any]:
        """What Generate asks for: an edited recipe counts where there is one."""
        chosen = edited if (edited or "").strip() else recipe or "plain"
        return {"kind": "generate", **self.settings.request(*values), "recipe": chosen}

    def filled(self, asked: dict[str, Any]) -> Updates:
        """The controls as a request has them."""
        recipe = str(asked.get("recipe", "balanced"))
        edited = recipe if "\n" in recipe else ""
        return {
            **self.settings.filled(asked), **self.speed.updates(asked["model"], recipe), self.edited: edited,
            self.recipe: gr.update(choices=self.choices(), value="balanced" if edited else recipe),
        }  # fmt: skip

    def choices(self) -> list[tuple[str, str]]:
        """Recipes as they are now: a training may have made another one."""
        return recipe_choices(self.engine, "video")

    @property
    def fills(self) -> list[Component]:
        """All that `filled` updates."""
        return [*self.settings.outputs, *self.speed_parts, self.edited, self.recipe]

    def other_model(self, model: str, prompt: str) -> Updates:
        recipe = self.speed.recipe(USUAL, model)
        return {**self.settings.for_model(model, prompt), **self.speed.updates(model, recipe), self.recipe: recipe}

    def slid(self, place: float, model: str) -> tuple[str, Any]:
        recipe = self.speed.recipe(place, model)
        return recipe, self.speed.updates(model, recipe)[self.speed.words]

    def chosen(self, recipe: str, model: str) -> Updates:
        return self.speed.updates(model, recipe or "plain")

    def check(self, text: str) -> str:
        return checked(self.engine, text or "")

    def written(self, recipe: str) -> str:
        return as_yaml(self.engine, recipe)

    def running(self, snapshot: Snapshot) -> Updates:
        """The preview, once there is one; until then the last picture stays."""
        preview = self.shelf.preview(snapshot)
        return {self.next: gr.update(visible=False), **({self.picture: preview, self.facts: ""} if preview else {})}

    def over(self, job: Job) -> Updates:
        if job.kind == "download":
            return self.settings.picker.looked_again(job.asked["model"])
        return self.shown(self.shelf.result(job.result["output"]))

    def shown(self, found: dict[str, Any]) -> Updates:
        """A result, also one of the history."""
        trace = self.shelf.trace(found)
        return {
            self.picture: self.shelf.picture(found), self.facts: generated(found), self.next: gr.update(visible=True), self.output: found["output"],
            self.timeline: gr.update(value=timeline(trace), visible=True), self.density: gr.update(value=density(trace), visible=True),
        }  # fmt: skip
