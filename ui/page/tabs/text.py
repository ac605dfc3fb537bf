"""Text: a canvas that fills in, in any order, or a text that is drafted and verified; coloured by when, or by whom, each token was written."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.ui.engine import Engine, Job, Snapshot
from hasten.ui.page import drafting
from hasten.ui.page.drafting import Drafting
from hasten.ui.page.numbers import box, read, written
from hasten.ui.page.results import Shelf, generated
from hasten.ui.page.settings import Picker, Speed, recipe_choices
from hasten.ui.page.speed import USUAL
from hasten.ui.page.watch import HIDDEN, TOLD, Updates, Watch, in_words
from hasten.ui.views.canvas import canvas
from hasten.ui.views.component import shown
from hasten.ui.views.decoding import decoding

PROMPT = "shuffle: j m n c g e b i ="
"""Of the bundled model, which sorts at once. Here many answers are right, so it decides token by token, and in no order."""


class TextTab:
    """kept: the browser's memory of jobs. Models that write from left to right are asked for a `decode`, others for a `text`."""

    def __init__(self, engine: Engine, kept: gr.BrowserState) -> None:
        self.engine, self.shelf = engine, Shelf(engine)
        with gr.Row(equal_height=False, elem_classes="sides"):
            with gr.Column(scale=5, min_width=300):
                self._controls()
            with gr.Column(scale=6, min_width=320):
                self.canvas = shown(canvas({}), elem_id="text-result")
                self.watch = Watch(engine, "text", kept, also=("decode",))
                self.facts = shown()
                self.text = gr.Textbox("", label="The text", lines=3, max_lines=16, buttons=["copy"], visible=False, interactive=False)
        with self.buttons:
            self.watch.stop_button()
        self._events()

    def _controls(self) -> None:
        self.picker = Picker(self.engine, ("text", "language"), "text")
        card = self.picker.cards()[0]
        self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=3, max_lines=10, elem_id="text-prompt")
        with gr.Column() as self.slide:
            self.speed = Speed(self.engine, card.id, "text")
        self.drafting = Drafting(self.engine)
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
        self.watch.starts(self.run.click, self.request, self.inputs)
        self.speed.slider.input(self.slid, [self.speed.slider, model], [self.recipe, self.speed.words], queue=False, **HIDDEN)
        self.recipe.input(self.chosen, [self.recipe, model], [self.speed.slider, self.speed.words], queue=False, **HIDDEN)
        model.input(in_words(self.other_model), [model, self.drafting.recipe, self.prompt], [*self.picker.parts, self.prompt, *self._sorts], **TOLD)

    @property
    def inputs(self) -> list[Component]:
        """In the order of `request`."""
        return [self.picker.model, self.prompt, self.recipe, self.length, self.seed, *self.drafting.inputs]

    @property
    def _sorts(self) -> list[Any]:
        """What `_for` updates."""
        return [self.slide, self.recipe, self.drafting.column, self.drafting.recipe]

    # --- handlers ---------------------------------------------------------------------------------

    def request(self, model: str, prompt: str, recipe: str, length: str, seed: int | None, *drafts: Any) -> dict[str, Any]:
        """What Write asks for."""
        tokens = read("length", length)
        asked = {"model": model, "prompt": prompt, "seed": int(seed or 0), **({"length": tokens} if tokens is not None else {})}
        if self._causal(model):
            return {"kind": "decode", **asked, **self.drafting.request(*drafts)}
        return {"kind": "text", **asked, "recipe": recipe or "plain"}

    def filled(self, asked: dict[str, Any]) -> Updates:
        """The controls as a request has them."""
        common = {
            self.picker.model: self.picker.card(asked["model"]).id, **self.picker.updates(asked["model"]), self.prompt: asked["prompt"],
            self.length: written(asked.get("length")), self.seed: asked.get("seed", 0),
        }  # fmt: skip
        if asked["kind"] == "decode":
            return {**common, **self._for(asked["model"]), **self.drafting.filled(asked)}
        recipe = str(asked.get("recipe", "text-balanced"))
        return {**common, **self._for(asked["model"]), self.recipe: gr.update(value=recipe, visible=True), **self.speed.updates(asked["model"], recipe)}

    @property
    def fills(self) -> list[Any]:
        """All that `filled` updates."""
        return [
            self.picker.model, *self.picker.parts, self.prompt, self.recipe, self.length, self.seed, self.speed.slider, self.speed.words, self.slide,
            *self.drafting.fills,
        ]  # fmt: skip

    def other_model(self, model: str, guesses: str, prompt: str) -> Updates:
        """What follows from another model: its controls, and an example where the prompt was one."""
        examples = {PROMPT, drafting.PROMPT, *(text for each in self.picker.cards() for text in each.prompts)}
        example = self._example(model) if not prompt.strip() or prompt in examples else None
        changed: Updates = {self.prompt: example} if example else {}
        return {**self.picker.updates(model), **self._for(model), **self.drafting.for_model(model, guesses), **changed}

    def _example(self, model: str) -> str | None:
        card = self.picker.card(model)
        return drafting.PROMPT if card.kind == "language" and card.where == "bundled" else next(iter(card.prompts), None)

    def slid(self, place: float, model: str) -> tuple[str, Any]:
        recipe = self.speed.recipe(place, model)
        return recipe, self.speed.updates(model, recipe)[self.speed.words]

    def chosen(self, recipe: str, model: str) -> Updates:
        return self.speed.updates(model, recipe or self.speed.recipe(USUAL, model))

    def running(self, snapshot: Snapshot) -> Updates:
        about, tokens = snapshot.data, snapshot.data.get("tokens")
        if not tokens:
            return {}
        found = decoding({**about, "title": "Writing"}) if "rounds" in about else canvas({"tokens": tokens, "title": "Writing"})
        return {self.canvas: found, self.facts: "", self.text: gr.update(visible=False)}

    def over(self, job: Job) -> Updates:
        return self.shown(self.shelf.result(job.result["output"]), fresh=True)

    def shown(self, found: dict[str, Any], fresh: bool = False) -> Updates:
        """A text, also one of the history. fresh: it is shown being written, for it may have been quicker than the eye."""
        text = {self.text: gr.update(value=found["text"], visible=True)}
        if found["kind"] == "decode":
            return {self.canvas: decoding(found), self.facts: "", **text}
        drawn = canvas({"tokens": found["tokens"], "steps": int(found["row"].get("nfe") or 0), "play": fresh})
        return {self.canvas: drawn, self.facts: generated(found), **text}

    # --- two sorts of models ----------------------------------------------------------------------

    def _causal(self, model: str) -> bool:
        """Does it write from left to right?"""
        return self.picker.card(model).kind == "language"

    def _for(self, model: str) -> Updates:
        """The controls that a model has."""
        causal = self._causal(model)
        return {self.slide: gr.update(visible=not causal), self.recipe: gr.update(visible=not causal), **self.drafting.show(causal)}
