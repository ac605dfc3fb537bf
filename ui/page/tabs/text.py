"""Text: a canvas that fills in, in any order, coloured by the step that wrote each token."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.ui.engine import Engine, Job, Snapshot
from hasten.ui.page.numbers import box, read, written
from hasten.ui.page.results import Shelf, generated
from hasten.ui.page.settings import Picker, Speed, recipe_choices
from hasten.ui.page.speed import USUAL
from hasten.ui.page.watch import HIDDEN, TOLD, Updates, Watch, in_words
from hasten.ui.views.canvas import canvas
from hasten.ui.views.component import shown

PROMPT = "shuffle: j m n c g e b i ="
"""Of the bundled model, which sorts at once. Here many answers are right, so it decides token by token, and in no order."""


class TextTab:
    """kept: the browser's memory of jobs."""

    def __init__(self, engine: Engine, kept: gr.BrowserState) -> None:
        self.engine, self.shelf = engine, Shelf(engine)
        with gr.Row(equal_height=False, elem_classes="sides"):
            with gr.Column(scale=5, min_width=300):
                self._controls()
            with gr.Column(scale=6, min_width=320):
                self.canvas = shown(canvas({}), elem_id="text-result")
                self.watch = Watch(engine, "text", kept)
                self.facts = shown()
                self.text = gr.Textbox("", label="The text", lines=3, max_lines=16, buttons=["copy"], visible=False, interactive=False)
        with self.buttons:
            self.watch.stop_button()
        self._events()

    def _controls(self) -> None:
        self.picker = Picker(self.engine, ("text",), "text")
        card = self.picker.cards()[0]
        self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=3, max_lines=10, elem_id="text-prompt")
        self.speed = Speed(self.engine, card.id, "text")
        with gr.Row(elem_classes="buttons") as self.buttons:
            self.run = gr.Button("Write", variant="primary", elem_classes="go", elem_id="text-run")
        with gr.Accordion("Advanced", open=False):
            self.recipe = gr.Dropdown(recipe_choices(self.engine, "text"), value="text-balanced", label="Recipe", allow_custom_value=True)
            with gr.Row():
                self.length = box("New tokens", elem_id="text-length")
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)

    def _events(self) -> None:
        model = self.picker.model
        self.watch.show([self.canvas, self.facts, self.text], self.running, self.over)
        self.watch.starts(self.run.click, self.request, [model, self.prompt, self.recipe, self.length, self.seed])
        self.speed.slider.input(self.slid, [self.speed.slider, model], [self.recipe, self.speed.words], queue=False, **HIDDEN)
        self.recipe.input(self.chosen, [self.recipe, model], [self.speed.slider, self.speed.words], queue=False, **HIDDEN)
        model.input(in_words(self.other_model), [model], [*self.picker.parts, self.prompt], **TOLD)

    # --- handlers ---------------------------------------------------------------------------------

    def request(self, model: str, prompt: str, recipe: str, length: str, seed: int | None) -> dict[str, Any]:
        """What Write asks for."""
        tokens = read("length", length)
        more = {"length": tokens} if tokens is not None else {}
        return {"kind": "text", "model": model, "prompt": prompt, "recipe": recipe or "plain", "seed": int(seed or 0), **more}

    def filled(self, asked: dict[str, Any]) -> Updates:
        """The controls as a request has them."""
        return {
            self.picker.model: self.picker.card(asked["model"]).id, **self.picker.updates(asked["model"]), self.prompt: asked["prompt"],
            self.recipe: asked.get("recipe", "text-balanced"), self.length: written(asked.get("length")), self.seed: asked.get("seed", 0),
            **self.speed.updates(asked["model"], str(asked.get("recipe", "text-balanced"))),
        }  # fmt: skip

    @property
    def fills(self) -> list[Component]:
        """All that `filled` updates."""
        return [self.picker.model, *self.picker.parts, self.prompt, self.recipe, self.length, self.seed, self.speed.slider, self.speed.words]

    def other_model(self, model: str) -> Updates:
        prompts = self.picker.card(model).prompts
        return {**self.picker.updates(model), **({self.prompt: prompts[0]} if prompts else {})}

    def slid(self, place: float, model: str) -> tuple[str, Any]:
        recipe = self.speed.recipe(place, model)
        return recipe, self.speed.updates(model, recipe)[self.speed.words]

    def chosen(self, recipe: str, model: str) -> Updates:
        return self.speed.updates(model, recipe or self.speed.recipe(USUAL, model))

    def running(self, snapshot: Snapshot) -> Updates:
        tokens = snapshot.data.get("tokens")
        return {self.canvas: canvas({"tokens": tokens, "title": "Writing"}), self.facts: "", self.text: gr.update(visible=False)} if tokens else {}

    def over(self, job: Job) -> Updates:
        return self.shown(self.shelf.result(job.result["output"]), fresh=True)

    def shown(self, found: dict[str, Any], fresh: bool = False) -> Updates:
        """A text, also one of the history. fresh: it is shown being written, for it may have been quicker than the eye."""
        return {
            self.canvas: canvas({"tokens": found["tokens"], "steps": int(found["row"].get("nfe") or 0), "play": fresh}), self.facts: generated(found),
            self.text: gr.update(value=found["text"], visible=True),
        }  # fmt: skip
