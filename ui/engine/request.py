"""What may be asked for: one strict, frozen class for each kind of job. There are no paths in them, only ids.

`read` makes one of JSON, whatever it is, or raises `RequestError`; nothing else escapes from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hasten.errors import LimitError, RecipeError, nearest
from hasten.ui.engine.limits import Limits, RequestError, short

PART = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
ModelId = Annotated[str, Field(pattern=rf"^(folder:)?{PART}(/{PART})?$", max_length=200)]
"""A bundled model's name, `folder:NAME` for one below the models folder, or `owner/name` of a remote one."""

LoraId = Annotated[str, Field(pattern=rf"^{PART}$", max_length=100)]
RecipeText = Annotated[str, Field(min_length=1, max_length=256 * 1024)]
"""A recipe's name (`balanced`, `auto:psnr=35`), `trained:ID` for a student of a training here, or the YAML text of a recipe."""

StudentId = Annotated[str, Field(pattern=r"^trained:[0-9a-f]{16}$")]
"""A student that a training here has made: the id of its output."""

Setting = bool | int | float | str
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


class Ask(BaseModel):
    """Base of all requests: strict, frozen, finite, and without unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Shape(Ask):
    """How large and how long; None leaves a value to the model. guidance: scale of classifier-free guidance."""

    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None


class Picture(Shape):
    """What pictures and clips are made of. negative: what to keep out. seed: of the noise. lora: an id of `Models.loras`.
    preview: pictures of the latents while it runs. decoding: at once, or in tiles, which need less memory and may show seams."""

    model: ModelId
    prompt: str
    negative: str = ""
    seed: int = 0
    lora: LoraId | None = None
    preview: bool = True
    decoding: Literal["whole", "tiles"] = "whole"


class Generate(Picture):
    """One picture or clip with one recipe. latents: a job that did the same and failed behind its loop; what it had denoised
    is decoded."""

    kind: Literal["generate"] = "generate"
    recipe: RecipeText = "balanced"
    latents: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None


class Compare(Picture):
    """The same noise plain and with each recipe; plain is always one and not named. repeats: how often each run is timed, in
    turns; its time is their median."""

    kind: Literal["compare"] = "compare"
    recipes: Annotated[tuple[RecipeText, ...], Field(min_length=1)] = ("balanced", "fast")
    repeats: int = 1


class Text(Ask):
    """A text of a masked language model. length: new tokens, None for the model's own. recipe: one for texts."""

    kind: Literal["text"] = "text"
    model: ModelId
    prompt: str
    length: int | None = None
    seed: int = 0
    recipe: RecipeText = "text-balanced"


class Tune(Shape):
    """The fastest recipe that keeps `budget` (`psnr>=30`) on `prompts`, within `seconds`. students: `trained:ID` of students to
    try besides. The same request goes on with the same study."""

    kind: Literal["tune"] = "tune"
    model: ModelId
    prompts: tuple[str, ...]
    students: tuple[StudentId, ...] = ()
    budget: Annotated[str, Field(max_length=60)] = "psnr>=30"
    seconds: float = 120.0
    seed: int = 0


class Train(Ask):
    """A student of `model` by a `method` of `hasten train`. settings: dotted names of `SETTINGS`, `CHOICES`, `SWITCHES` and
    `method.*`. minutes: after which it stops with a checkpoint. The same request goes on from its checkpoint."""

    kind: Literal["train"] = "train"
    method: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")]
    model: ModelId
    prompts: tuple[str, ...] = ()
    settings: dict[str, Setting] = Field(default_factory=dict)
    minutes: float = 10.0


class Download(Ask):
    """Fetch a remote model. Nothing else ever fetches."""

    kind: Literal["download"] = "download"
    model: ModelId


Request = Generate | Compare | Text | Tune | Train | Download
KINDS: dict[str, type[Ask]] = {kind.model_fields["kind"].default: kind for kind in get_args(Request)}
_ANY: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])


def read(data: object, limits: Limits | None = None) -> Request:
    """The request that `data` is: a mapping, JSON text or bytes, or a request. Raises `RequestError` for anything that is not
    exactly one within the limits."""
    limits = limits or Limits()
    found: Request = data if isinstance(data, get_args(Request)) else _parsed(_text(data, limits))
    _check(found, limits)
    return found


def to_json(request: Request) -> str:
    """`read` gives an equal request back."""
    return request.model_dump_json()


def _text(data: object, limits: Limits) -> str | bytes:
    """JSON text of what was given."""
    if not isinstance(data, str | bytes):
        if not isinstance(data, Mapping):
            raise RequestError("request", data, "a JSON object", 'For example {"kind": "generate", "model": "tiny-video", "prompt": "a seven"}.')
        try:
            data = json.dumps(dict(data))
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError("request", type(error).__name__, "plain JSON values") from None
    if len(data) > limits.max_request:
        raise RequestError("request", f"{len(data):,} bytes", f"at most {limits.max_request:,} bytes", "Shorten it.")
    return data


def _parsed(text: str | bytes) -> Request:
    try:
        found: Request = _ANY.validate_json(text)
    except ValidationError as error:
        raise _explained(error) from None
    except ValueError as error:  # text that is no UTF-8
        raise RequestError("request", type(error).__name__, "JSON in UTF-8") from None
    return found


def _explained(error: ValidationError) -> RequestError:
    """The first thing that is wrong, in our words."""
    first = error.errors(include_url=False)[0]
    kind, where = first["type"], [str(part) for part in first["loc"]]
    field = ".".join(where[1:] if where and where[0] in KINDS else where) or "request"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        got = first.get("input")
        named = got.get("kind") if isinstance(got, dict) else got
        return RequestError("kind", named, ", ".join(KINDS), "Name one of them.")
    if kind == "extra_forbidden":
        known = KINDS[where[0]].model_fields if where and where[0] in KINDS else {}
        return RequestError(field, first["input"], ", ".join(known) or "no such key", f"Leave it out.{nearest(field, known)}")
    if kind == "missing":
        return RequestError(field, None, "a value", "It is needed.")
    if kind == "json_invalid":
        return RequestError("request", str(first.get("ctx", {}).get("error", "")), "JSON", "Check the brackets and quotes.")
    return RequestError(field, first["input"], first["msg"].removeprefix("Input should be ").rstrip("."))


# --- limits -------------------------------------------------------------------------------------------------


def _check(found: Request, limits: Limits) -> None:
    """Raise `RequestError` unless all of it is allowed."""
    try:
        if isinstance(found, Shape):
            _check_shape(found, limits)
        if isinstance(found, Generate | Compare | Text):
            _check_prompts({"prompt": found.prompt}, limits)
            _within("seed", found.seed, 0, 2**63 - 1)
        if isinstance(found, Picture) and found.negative:
            _check_prompts({"negative": found.negative}, limits)
        if isinstance(found, Text) and found.length is not None:
            _within("length", found.length, 1, limits.max_tokens)
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


def _check_prompts(texts: Mapping[str, str], limits: Limits) -> None:
    for name, text in texts.items():
        if not text.strip():
            raise RequestError(name, text, "some words", "Write what to make, for example 'a seven moving left'.")
        if len(text) > limits.max_prompt:
            raise RequestError(name, f"{len(text):,} characters", f"at most {limits.max_prompt:,}", "Shorten it.")


def _check_study(found: Tune | Train, limits: Limits) -> None:
    if len(found.prompts) > limits.max_prompts:
        raise RequestError("prompts", len(found.prompts), f"at most {limits.max_prompts}", "Leave some out.")
    _check_prompts({f"prompts.{number}": text for number, text in enumerate(found.prompts)}, limits)
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

    if isinstance(found, Generate | Text):
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
