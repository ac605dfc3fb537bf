"""The controls of drafted decoding: who guesses, and how tokens are chosen. They stand where the slider of other texts does."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.errors import HastenError, UsageError
from hasten.ui.engine import Engine
from hasten.ui.engine.recipes import TRAINED, check, parsed
from hasten.ui.page.numbers import box, read, written
from hasten.ui.page.sentences import said
from hasten.ui.page.settings import guessers
from hasten.ui.page.watch import HIDDEN, Updates
from hasten.ui.views.component import shown

PROMPT = "def push(self, item):\n    self.items.append(item)\n\ndef pop(self"
"""Of bundled models, which have read Python's own sources."""

FIRST = {
    "look-up": "The text itself: what followed the same words before", "dyspec": "A small model, as a tree (tiny-draft)",
    "look-up-or-draft": "Both: the text, and the small model beside it", "plain": "Nobody: plain decoding",
}  # fmt: skip
"""Recipes that most people want, in words."""

PICTURES = "speculative-jacobi"
"""Drafts the tokens of images."""

EVERY = "every=true"
"""How a recipe's name says: also where it does not pay."""

WORDS = "Guesses change how fast a text is written, not what is written: each one is checked by the model itself."
LOSSY = "This recipe keeps guesses that the model would not have written: the text may be another one."


class Drafting:
    """Make it where the controls are to stand, then `show` says for which models they are there."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        with gr.Column(visible=False) as self.column:
            self.recipe = gr.Dropdown(choices(engine, ""), value="look-up", label="Who guesses", allow_custom_value=True, elem_id="text-drafts")
            self.every = gr.Checkbox(False, label="Guess in every forward, also where it does not pay", container=False)
            with gr.Row():
                self.temperature = box("Temperature", "0: the likeliest", elem_id="text-temperature")
                self.top_k = box("Top k", "all", elem_id="text-top-k")
            self.words = shown(said(WORDS))
        self.recipe.input(self.told, [self.recipe], [self.every, self.words], queue=False, **HIDDEN)

    @property
    def inputs(self) -> list[Component]:
        """In the order of `request`."""
        return [self.recipe, self.every, self.temperature, self.top_k]

    @property
    def fills(self) -> list[Any]:
        """All that `filled` and `show` update."""
        return [*self.inputs, self.words, self.column]

    def request(self, recipe: str, every: bool, temperature: str, top_k: str) -> dict[str, Any]:
        """A request's keys that stand here. What was left empty is left out."""
        warmth, among = read("temperature", temperature, whole=False), read("top_k", top_k)
        numbers = {"temperature": float(warmth) if warmth is not None else None, "top_k": among}
        return {"recipe": _every(recipe or "plain") if every else recipe or "plain", **{key: value for key, value in numbers.items() if value is not None}}

    def filled(self, asked: dict[str, Any]) -> Updates:
        """The controls as a request has them. Raises `UsageError` where its student is gone."""
        recipe, _, more = str(asked["recipe"]).partition(":")
        every, found = more == EVERY, choices(self.engine, asked["model"])
        if TRAINED.fullmatch(asked["recipe"]) and more not in self.engine.outputs.trained():
            raise UsageError(f"It was made with {asked['recipe']!r}, a student that is not here any more. Train it again, or choose who else guesses.")
        return {
            self.recipe: gr.update(choices=found, value=recipe if every else asked["recipe"]), **self.told(asked["recipe"], every),
            self.temperature: written(asked.get("temperature") or None), self.top_k: written(asked.get("top_k")),
        }  # fmt: skip

    def told(self, recipe: str, every: bool | None = None) -> Updates:
        """What follows from a recipe: whether it can guess in every forward, and what is said of its guesses. every: whether it does;
        None leaves that as it is where it can."""
        recipe = recipe or "plain"
        able = EVERY in recipe or _every(recipe) != recipe
        value: dict[str, Any] = {"value": every} if every is not None else {} if able else {"value": False}
        return {self.every: gr.update(interactive=able, **value), self.words: _words(recipe)}

    def show(self, wanted: bool) -> Updates:
        return {self.column: gr.update(visible=wanted)}

    def offered(self, model: str) -> Any:
        """Who may guess for a model, as it is now: a training may have made another one."""
        return gr.update(choices=choices(self.engine, model))

    def for_model(self, model: str, recipe: str) -> Updates:
        """What follows from another model. recipe: the one that is chosen, which cannot stay where it is a student of another model."""
        found = choices(self.engine, model)
        odd = TRAINED.fullmatch(recipe or "") is not None and recipe not in [each for _, each in found]
        value: dict[str, Any] = {"value": "look-up"} if odd else {}
        return {self.recipe: gr.update(choices=found, **value)}


def choices(engine: Engine, model: str) -> list[tuple[str, str]]:
    """(label, recipe) for a model: those of `FIRST`, what tuning found for it, students trained for it, small models of the models
    folder, then all others that need no file."""
    from hasten.pipelines.recipes import catalogue

    small = [(f"A small model, as a tree ({name})", f"dyspec:model={name}") for name in engine.models.drafting()]
    others = [
        (entry.name, entry.name) for entry in catalogue()
        if entry.recipe.draft is not None and entry.name not in (*FIRST, PICTURES) and _stands(entry.name)
    ]
    return [*((label, name) for name, label in FIRST.items()), *_tuned(engine, model), *guessers(engine, model), *(each for each in small if _stands(each[1])), *others]


def _tuned(engine: Engine, model: str) -> list[tuple[str, str]]:
    """(label, recipe as YAML) of what `hasten tune --budget lossless` has kept in this home for a model, the fastest first. Files that
    are none, and recipes that name a file, are left out: a `Budget` says of them what is wrong."""
    from hasten.pipelines.tune.decode_result import LOSSLESS
    from hasten.recipe import read as read_recipe

    found: list[tuple[float, str, str]] = []
    for file in sorted((engine.place.home / "tuned").glob("*.yaml")) if model else ():
        with suppress(HastenError):
            recipe = read_recipe(file)
            stamp, text = recipe.tuned, recipe.to_yaml()
            if recipe.draft is not None and stamp is not None and (stamp.budget, stamp.model) == (LOSSLESS, engine.models.source(model)) and _stands(text):
                found.append((stamp.speedup or 0.0, f"What tuning found: {recipe.draft.kind} ({stamp.speedup or 0.0:.3g}×, {stamp.date})", text))
    return [(label, text) for _, label, text in sorted(found, reverse=True)]


def _words(recipe: str) -> str:
    """What is said of a recipe's guesses, or what is wrong with it."""
    try:
        check(recipe)
        lossy = TRAINED.fullmatch(recipe) is None and not getattr(parsed(recipe).verify, "lossless", True)
    except HastenError as error:
        return said(str(error), "warning")
    return said(LOSSY, "warning") if lossy else said(WORDS)


def _stands(recipe: str) -> bool:
    """May a request name it as it is?"""
    try:
        check(recipe)
    except HastenError:
        return False
    return True


def _every(recipe: str) -> str:
    """The same in every forward; recipes that know no such thing, and those as YAML, stay as they are."""
    if "\n" in recipe or ": " in recipe or EVERY in recipe:
        return recipe
    changed = f"{recipe},{EVERY}" if ":" in recipe else f"{recipe}:{EVERY}"
    return changed if _stands(changed) else recipe
