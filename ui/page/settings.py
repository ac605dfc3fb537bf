"""The controls of a request, made once for each tab: what is asked most stands open, everything else in "Advanced"."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.errors import HastenError, UsageError
from hasten.ui.engine import Engine, RequestError
from hasten.ui.engine.models import Card
from hasten.ui.engine.recipes import TRAINED, check, named, portable, recipe_of
from hasten.ui.page.numbers import box, read, written
from hasten.ui.page.sentences import model_words, said
from hasten.ui.page.speed import PICTURES as PICTURE_LEVELS
from hasten.ui.page.speed import TEXTS, USUAL, Level, levels, place_of
from hasten.ui.page.watch import HIDDEN, TOLD, Updates, in_words
from hasten.ui.views.component import shown

PICTURES = ("image", "video")
ORDER = {"tiny-video": 0, "tiny-image": 1, "tiny-flux": 2, "tiny-dllm": 0, "tiny-lm": 1}
"""The bundled models that a picker begins with."""

GUESSERS = {"medusa": "heads behind the model (Medusa)", "mtp": "masks behind the text (multi-token)", "ppd": "prompt tokens behind the text (PPD)"}
"""Methods whose students guess tokens -> what they are, in words."""

NUMBERS = {"steps": "Steps", "width": "Width", "height": "Height", "frames": "Frames"}
CALLED = {"steps": "num_inference_steps", "width": "width", "height": "height", "frames": "num_frames", "guidance": "guidance_scale"}
"""Our names -> those of a card's `call`, which says what is usual."""


class Picker:
    """Which model, and what is known of it; a button fetches one that is not here."""

    def __init__(self, engine: Engine, kinds: Sequence[str], name: str) -> None:
        self.engine, self.kinds = engine, tuple(kinds)
        cards = self.cards()
        self.model = gr.Dropdown(choices(cards), value=cards[0].id if cards else None, label="Model", elem_id=f"{name}-model")
        self.words = shown(model_words(cards[0].to_dict()) if cards else "", elem_classes="model-words")
        self.fetch = gr.Button("Download this model", visible=False, size="sm")

    def cards(self) -> list[Card]:
        """Those of its kinds: bundled first."""
        return usual_first([card for card in self.engine.models.cards() if card.kind in self.kinds])

    def card(self, model: str) -> Card:
        return self.engine.models.card(model)

    def updates(self, model: str) -> Updates:
        """What follows from another model."""
        card = self.card(model)
        fetch = card.where == "remote" and not card.ready
        return {self.words: model_words(card.to_dict()), self.fetch: gr.update(visible=fetch, value=f"Download it (about {card.bytes / 1e9:.0f} GB)")}

    @property
    def parts(self) -> list[Component]:
        """What `updates` updates."""
        return [self.words, self.fetch]

    def looked_again(self, model: str) -> Updates:
        """After a download, or in a page that was just opened."""
        return {self.model: gr.update(choices=choices(self.cards())), **self.updates(model)}


class Speed:
    """The slider, and the recipe that it names; a recipe of any other name leaves the slider where it is."""

    def __init__(self, engine: Engine, model: str, kind: str, lowest: int = 0) -> None:
        self.engine, self.kind, self.lowest = engine, kind, lowest
        found = self.levels(model)
        self.slider = gr.Slider(
            lowest, len(found) - 1, value=USUAL, step=1, label="Fidelity ↔ Speed", elem_classes="speed", buttons=[], precision=0,
        )  # fmt: skip
        self.words = shown(level_words(found[USUAL]), elem_classes="level")

    def levels(self, model: str) -> tuple[Level, ...]:
        return levels(model, self.kind)

    def recipe(self, place: float, model: str) -> str:
        """The recipe of a position."""
        found = self.levels(model)
        return found[max(self.lowest, min(int(place), len(found) - 1))].recipe

    def updates(self, model: str, recipe: str) -> Updates:
        """For a model and a recipe, however they were chosen."""
        found = self.levels(model)
        at = place_of(recipe, found)
        words = level_words(found[at]) if at is not None else said(_other(recipe))
        most = len(found) - 1
        slider = gr.update(maximum=most) if at is None else gr.update(maximum=most, value=max(self.lowest, at))
        return {self.slider: slider, self.words: words}


class Settings:
    """All controls of a picture. engine, name: of the tab. `main` and `advanced` place them; `request` reads them."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name

    def main(self, prompt: str) -> None:
        """Model and prompt."""
        self.picker = Picker(self.engine, PICTURES, self.name)
        self.prompt = gr.Textbox(prompt, label="Prompt", lines=2, max_lines=6, elem_id=f"{self.name}-prompt", max_length=self.engine.limits.max_prompt)

    def advanced(self) -> None:
        """What most people leave alone. None is what is usual for the model."""
        with gr.Row(equal_height=False):
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100, elem_id=f"{self.name}-seed")
            with gr.Column(min_width=150, elem_classes="beside"):
                self.dice = gr.Button("Another seed", size="sm")
                self.reuse = gr.Button("The last one's", size="sm")
        self.negative = gr.Textbox("", label="Keep out", placeholder="what should not be in it", lines=1)
        card = self.picker.cards()[0]
        with gr.Row():
            self.numbers = {key: box(label, usual(card, key), elem_id=f"{self.name}-{key}") for key, label in NUMBERS.items()}
            self.guidance = box("Guidance", usual(card, "guidance"), elem_id=f"{self.name}-guidance")
        with gr.Row():
            self.lora = gr.Dropdown(loras(self.engine), value="", label="LoRA", min_width=160)
            with gr.Column(min_width=160):
                self.preview = gr.Checkbox(True, label="Show a preview while it runs", container=False)
                self.tiles = gr.Checkbox(False, label="Decode in tiles, for less memory", container=False)
        self.dice.click(lambda: secrets.randbelow(2**31), None, [self.seed], queue=False, **HIDDEN)
        self.reuse.click(in_words(self._last_seed), None, [self.seed], **TOLD)

    @property
    def inputs(self) -> list[Component]:
        """In the order of `request`."""
        return [self.picker.model, self.prompt, self.seed, self.negative, *self.numbers.values(), self.guidance, self.lora, self.preview, self.tiles]

    def request(self, model: str, prompt: str, seed: int | None, negative: str, *more: Any) -> dict[str, Any]:
        """A request without kind and recipe. What was left empty is left out."""
        guidance, lora, preview, tiles = more[len(NUMBERS) :]
        numbers = {key: read(key, typed) for key, typed in zip(NUMBERS, more, strict=False)}
        given = {**numbers, "guidance": read("guidance", guidance, whole=False), "lora": lora or None}
        return {
            "model": model, "prompt": prompt, "seed": int(seed or 0), "negative": negative or "", "preview": bool(preview),
            "decoding": "tiles" if tiles else "whole",
            **{key: value for key, value in given.items() if value is not None},
        }  # fmt: skip

    def filled(self, asked: Mapping[str, Any]) -> Updates:
        """The controls as a request has them. Raises `ModelError` for a model that is not here."""
        card = self.picker.card(str(asked["model"]))
        style = asked.get("lora") or ""
        if style and style not in self.engine.models.loras():
            raise UsageError(f"It was made with the LoRA {style!r}, which is not here. Put its .safetensors file into the LoRA folder.")
        return {
            self.picker.model: card.id, **self.picker.updates(card.id), self.prompt: asked["prompt"], self.seed: asked.get("seed", 0),
            self.negative: asked.get("negative", ""), self.lora: style,
            self.preview: asked.get("preview", True), self.tiles: asked.get("decoding") == "tiles", **self._boxes(card, asked),
        }  # fmt: skip

    def _boxes(self, card: Card, asked: Mapping[str, Any]) -> Updates:
        """The boxes for numbers, with what is usual for the model where they stay empty."""
        named = {**self.numbers, "guidance": self.guidance}
        return {each: gr.update(value=written(asked.get(key)), placeholder=usual(card, key)) for key, each in named.items()}

    def for_model(self, model: str, prompt: str) -> Updates:
        """What follows from another model: its words, its usual numbers, and an example where the prompt was one."""
        card = self.picker.card(model)
        examples = {text for each in self.picker.cards() for text in each.prompts}
        words: Updates = {self.prompt: card.prompts[0]} if card.prompts and (not prompt.strip() or prompt in examples) else {}
        usuals: Updates = {each: gr.update(placeholder=usual(card, key)) for key, each in {**self.numbers, "guidance": self.guidance}.items()}
        return {**self.picker.updates(model), **usuals, **words}

    @property
    def outputs(self) -> list[Component]:
        """All that `filled` and `for_model` update."""
        return [*self.inputs, *self.picker.parts]

    def _last_seed(self) -> int:
        for job in self.engine.jobs.list(20, kinds=["generate", "compare"]):
            return int(job.asked.get("seed", 0))
        raise UsageError("Nothing was generated yet.")


def recipe_choices(engine: Engine, kind: str) -> list[tuple[str, str]]:
    """(label, name) of recipes for `kind` ("text" or pictures): the slider's, students trained here, then all others."""
    from hasten.pipelines.recipes import acts_on, catalogue

    wanted = "text diffusion" if kind == "text" else "diffusion models"
    first = [(f"{level.label} ({level.recipe})", level.recipe) for level in (TEXTS if kind == "text" else PICTURE_LEVELS)]
    mine = [] if kind == "text" else students(engine)
    have = {name for _, name in first}
    others = [(entry.name, entry.name) for entry in catalogue() if entry.name not in have and acts_on(entry.recipe) == wanted]
    return first + mine + others


def students(engine: Engine) -> list[tuple[str, str]]:
    """(label, recipe) of the students trained here that draw, the newest first."""
    asked = {name: found["request"] for name, found in _trained(engine) if not found.get("drafts")}
    return [(f"Your student {name[:6]}: {each['method']} of {each['model']}", f"trained:{name}") for name, each in asked.items()]


def guessers(engine: Engine, model: str) -> list[tuple[str, str]]:
    """(label, recipe) of the students trained here that guess tokens for `model`, the newest first. They fit no other model."""
    mine = {name: found["request"]["method"] for name, found in _trained(engine) if found.get("drafts") and found["model"] == model}
    return [(f"Your student {name[:6]}: {GUESSERS.get(method, method)}", f"trained:{name}") for name, method in mine.items()]


def _trained(engine: Engine) -> list[tuple[str, dict[str, Any]]]:
    """(id, result) of the trainings whose student a recipe may name, the newest first."""
    return [(name, engine.outputs.get(name)) for name in reversed(engine.outputs.trained())]


def checked(engine: Engine, recipe: str) -> str:
    """An edited recipe's state in words: used, or what is wrong with it and where."""
    if not recipe.strip():
        return said("Empty: the recipe chosen above is used.")
    try:
        check(recipe)
        return said(f"This recipe is used: {named(recipe)}.", "good")
    except HastenError as error:
        return said(str(error), "warning")


def as_yaml(engine: Engine, recipe: str) -> str:
    """The text of a recipe, ready to be edited. Raises `RequestError` for one that is none."""
    try:
        known = engine.outputs.trained()
        return portable(recipe_of(recipe, known), known).to_yaml()
    except HastenError as error:
        raise RequestError("recipe", recipe, str(error)) from None


def loras(engine: Engine) -> list[tuple[str, str]]:
    return [("none", ""), *((name, name) for name in engine.models.loras())]


def choices(cards: Sequence[Card]) -> list[tuple[str, str]]:
    """(label, id) for a picker."""
    return [(card.id if card.ready else f"{card.id} (about {card.bytes / 1e9:.0f} GB to download)", card.id) for card in cards]


def usual_first(cards: Sequence[Card]) -> list[Card]:
    """In the order of a picker."""
    where = ("bundled", "folder", "remote")
    return sorted(cards, key=lambda card: (where.index(card.where), ORDER.get(card.id, 9)))


def usual(card: Card, key: str) -> str:
    """What is usual for a model, as a placeholder."""
    value = card.call.get(CALLED[key])
    return f"{value:g}" if isinstance(value, int | float) else "usual"


def _other(recipe: str) -> str:
    """What the slider says of a recipe that has no place on it."""
    if TRAINED.fullmatch(recipe):
        return f"Your {named(recipe)} draws it, in as few calls as it has learnt."
    return f"Recipe: {'edited below' if chr(10) in recipe else recipe}."


def level_words(level: Level) -> str:
    return said(f"{level.label}. {level.sentence}")
