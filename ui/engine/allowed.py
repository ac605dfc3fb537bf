"""What of a request is allowed: sizes, numbers, settings of trainings, and recipes that are some."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hasten.errors import LimitError, RecipeError, nearest
from hasten.ui.engine.limits import Limits, RequestError, short
from hasten.ui.engine.request import Compare, Decode, Generate, Picture, Request, Shape, Text, Train, Tune

SETTINGS: dict[str, tuple[float, float]] = {
    "train.steps": (1, 1e7), "train.batch": (1, 4096), "train.accumulate": (1, 256), "train.lr": (1e-9, 10), "train.weight_decay": (0, 10),
    "train.warmup": (0, 1e6), "train.cooldown": (0, 1), "train.clip": (1e-6, 1e6), "train.average": (0, 0.99999),
    "train.samples_every": (0, 1e6), "train.samples": (1, 64), "train.seed": (0, 2**63 - 1), "train.checkpoint_every": (0, 1e6),
    "student.rank": (1, 1024), "student.alpha": (1e-6, 1e6), "data.count": (1, 1e6), "data.drop": (0, 0.99),
    "data.call.num_inference_steps": (1, 200), "data.call.guidance_scale": (0, 100), "data.call.height": (8, 4096),
    "data.call.width": (8, 4096), "data.call.num_frames": (1, 1025), "data.call.max_new_tokens": (1, 8192),
}  # fmt: skip
"""Settings of a training that are numbers, with what is allowed. `method.*` may be any number or yes and no."""

CHOICES = {"train.schedule": ("plateau", "constant", "linear", "cosine"), "train.precision": ("no", "bf16")}
SWITCHES = ("student.full", "train.checkpointing")

EXAMPLE = "Write what to make, for example 'a seven moving left'."
EXAMPLES = {"text": "Write what to go on from, for example 'sort: b a ='.", "decode": "Write what to go on from, for example 'def pop(self'."}
"""What is said of an empty prompt, by kind of request."""

MOST_TOKENS = 10_000_000
"""No vocabulary is larger."""


def check(found: Request, limits: Limits) -> None:
    """Raise `RequestError` unless all of it is allowed."""
    try:
        if isinstance(found, Shape):
            _check_shape(found, limits)
        if isinstance(found, Generate | Compare | Text | Decode):
            longest = limits.max_text if isinstance(found, Text | Decode) else limits.max_prompt
            _check_prompts({"prompt": found.prompt}, longest, EXAMPLES.get(found.kind, EXAMPLE))
            _within("seed", found.seed, 0, 2**63 - 1)
        if isinstance(found, Picture) and found.negative:
            _check_prompts({"negative": found.negative}, limits.max_prompt)
        if isinstance(found, Text | Decode):
            _within("length", found.length, 1, limits.max_tokens)
        if isinstance(found, Decode):
            _check_drawing(found)
        if isinstance(found, Tune | Train):
            _check_study(found, limits)
        _check_recipes(found, limits)
    except RequestError:
        raise
    except LimitError as error:
        raise RequestError("request", "too much", str(error)) from None
    if isinstance(found, Train):
        _check_settings(found)


def _check_shape(found: Shape, limits: Limits) -> None:
    _within("steps", found.steps, 1, limits.max_steps)
    _within("width", found.width, limits.least_side, limits.max_side)
    _within("height", found.height, limits.least_side, limits.max_side)
    _within("frames", found.frames, 1, limits.max_frames)
    _within("guidance", found.guidance, 0, 100)
    volume = (found.width or 1) * (found.height or 1) * (found.frames or 1)
    if volume > limits.max_volume:
        raise RequestError(
            "width x height x frames", f"{volume:,} pixels", f"at most {limits.max_volume:,}", "Ask for a smaller size or fewer frames."
        )


def _check_prompts(texts: Mapping[str, str], longest: int, example: str = EXAMPLE) -> None:
    for name, text in texts.items():
        if not text.strip():
            raise RequestError(name, text, "some words", example)
        if len(text) > longest:
            raise RequestError(name, f"{len(text):,} characters", f"at most {longest:,}", "Shorten it.")


def _check_drawing(found: Decode) -> None:
    if found.temperature:
        _within("temperature", found.temperature, 0.01, 10)
    elif found.top_k is not None:
        raise RequestError("top_k", found.top_k, "none at temperature 0, where nothing is drawn", "Leave it out, or give a temperature.")
    _within("top_k", found.top_k, 1, MOST_TOKENS)


def _check_study(found: Tune | Train, limits: Limits) -> None:
    if len(found.prompts) > limits.max_prompts:
        raise RequestError("prompts", len(found.prompts), f"at most {limits.max_prompts}", "Leave some out.")
    _check_prompts({f"prompts.{number}": text for number, text in enumerate(found.prompts)}, limits.max_prompt)
    if isinstance(found, Train):
        _within("minutes", found.minutes, 0.01, limits.max_minutes)
        return
    if len(found.students) > limits.max_recipes:
        raise RequestError("students", len(found.students), f"at most {limits.max_recipes}", "Leave some out.")
    if len(found.prompts) < 4:
        raise RequestError("prompts", len(found.prompts), "four or more, of which every third is held out", "Add some.")
    _within("seconds", found.seconds, 1, limits.max_seconds)
    _within("seed", found.seed, 0, 2**31 - 1)


def _check_settings(found: Train) -> None:
    for key, value in found.settings.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if key in SETTINGS:
            if not number:
                raise RequestError(f"settings.{key}", value, "a number")
            _within(f"settings.{key}", value, *SETTINGS[key])
        elif key in CHOICES:
            if value not in CHOICES[key]:
                raise RequestError(f"settings.{key}", value, ", ".join(CHOICES[key]))
        elif key in SWITCHES or key.startswith("method."):
            if not (isinstance(value, bool) or (number and key.startswith("method."))):
                raise RequestError(f"settings.{key}", value, "yes or no" if key in SWITCHES else "a number, or yes or no")
        else:
            known = [*SETTINGS, *CHOICES, *SWITCHES]
            raise RequestError(f"settings.{short(key)}", value, f"method.* and {', '.join(known)}", f"Leave it out.{nearest(key, known)}")


def _check_recipes(found: Request, limits: Limits) -> None:
    """Every recipe must be one; those of a comparison of different names."""
    from hasten.ui.engine.recipes import named

    if isinstance(found, Generate | Text | Decode):
        _recipe("recipe", found.recipe)
    if not isinstance(found, Compare):
        return
    _within("repeats", found.repeats, 1, limits.max_repeats)
    if len(found.recipes) > limits.max_recipes:
        raise RequestError("recipes", len(found.recipes), f"at most {limits.max_recipes}", "Leave some out.")
    names = []
    for number, text in enumerate(found.recipes):
        _recipe(f"recipes.{number}", text)
        names.append(named(text))
    if twice := next((name for name in names if names.count(name) > 1 or name == "plain"), None):
        raise RequestError("recipes", twice, "different ones; plain is always compared", "Leave it out, or give it another name.")


def _recipe(field: str, text: str) -> None:
    from hasten.ui.engine.recipes import check

    try:
        check(text)
    except RecipeError as error:
        raise RequestError(field, text, str(error).rstrip(".")) from None


def _within(name: str, value: Any, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise RequestError(name, value, f"{low:,} to {high:,}")
