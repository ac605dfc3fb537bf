"""What may be asked for: one strict, frozen class for each kind of job. There are no paths in them, only ids.

`read` makes one of JSON, whatever it is, or raises `RequestError`; nothing else escapes from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hasten.errors import nearest
from hasten.ui.engine.limits import Limits, RequestError

PART = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
ModelId = Annotated[str, Field(pattern=rf"^(folder:)?{PART}(/{PART})?$", max_length=200)]
"""A bundled model's name, `folder:NAME` for one below the models folder, or `owner/name` of a remote one."""

LoraId = Annotated[str, Field(pattern=rf"^{PART}$", max_length=100)]
RecipeText = Annotated[str, Field(min_length=1, max_length=256 * 1024)]
"""A recipe's name (`balanced`, `auto:psnr=35`), `trained:ID` for a student of a training here, or the YAML text of a recipe."""

StudentId = Annotated[str, Field(pattern=r"^trained:[0-9a-f]{16}$")]
"""A student that a training here has made: the id of its output."""

Setting = bool | int | float | str


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


class Decode(Ask):
    """A prompt that a causal language model goes on with, and plain decoding of it besides. recipe: one that drafts, or plain.
    length: new tokens, at most. temperature: 0 takes the most probable token each time, more draws them.
    top_k: draws among so many, None among all."""

    kind: Literal["decode"] = "decode"
    model: ModelId
    prompt: str
    length: int = 96
    seed: int = 0
    recipe: RecipeText = "look-up"
    temperature: float = 0.0
    top_k: int | None = None


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
    """A student of `model` by a `method` of `hasten train`. settings: dotted names of `allowed.SETTINGS`, `CHOICES`, `SWITCHES` and
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


Request = Generate | Compare | Text | Decode | Tune | Train | Download
KINDS: dict[str, type[Ask]] = {kind.model_fields["kind"].default: kind for kind in get_args(Request)}
_ANY: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])


def read(data: object, limits: Limits | None = None) -> Request:
    """The request that `data` is: a mapping, JSON text or bytes, or a request. Raises `RequestError` for anything that is not
    exactly one within the limits."""
    from hasten.ui.engine.allowed import check  # it knows the kinds above

    limits = limits or Limits()
    found: Request = data if isinstance(data, get_args(Request)) else _parsed(_text(data, limits))
    check(found, limits)
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
