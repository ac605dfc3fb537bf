"""What a caller of `/v1` sends, as a request of the engine. Keys are those of the usual image and video APIs, and a few more."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hasten.errors import nearest
from hasten.ui.engine.limits import short

MOST = 4
"""Pictures of one call, at most."""

SHARED = {
    "negative_prompt": "negative", "seed": "seed", "steps": "steps", "num_inference_steps": "steps", "guidance": "guidance",
    "guidance_scale": "guidance", "recipe": "recipe", "lora": "lora",
}  # fmt: skip
"""Keys beyond the usual API's -> those of `Generate`."""

USUAL = ("model", "prompt", "size", "user", "extra_body")
IMAGE = (*USUAL, "n", "response_format", *SHARED)
VIDEO = (*USUAL, "seconds", "frames", "num_frames", *SHARED)
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
WHOLE, BROKEN = re.compile(r"-?\d{1,19}"), re.compile(r"-?\d{1,19}(\.\d{0,19})?")
NUMBERS = ("seed", "steps", "num_inference_steps", "n", "frames", "num_frames")
SLOW, USUAL_FPS, LONG = 8, 16, 33
"""Frames per second of short clips and of others, and from how many frames on one is no short clip (`work.generate`)."""


class ApiError(Exception):
    """An answer that is no result. status: of HTTP. param: the key that is wrong. code: a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        super().__init__(message)


def body_of(raw: bytes) -> dict[str, Any]:
    """The JSON object that was sent. Raises `ApiError`."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is no JSON. Send an object with model and prompt.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "The body is JSON, but no object. Send one with model and prompt.", code="invalid_json")
    return found


def form_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same from a form, whose values are all text."""
    found: dict[str, Any] = dict(fields)
    for name, value in fields.items():
        if isinstance(value, str) and name in (*NUMBERS, "guidance", "guidance_scale"):
            if WHOLE.fullmatch(value):
                found[name] = int(value)
            elif BROKEN.fullmatch(value):
                found[name] = float(value)
    return found


def images(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The engine's requests, one for each picture with a seed of its own, and `url` or `b64_json`. Raises `ApiError`."""
    values = _flat(body, IMAGE)
    form = values.get("response_format") or "url"
    if form not in ("url", "b64_json"):
        raise ApiError(400, f"response_format: got {short(form)}; allowed: url, b64_json.", "response_format")
    count = 1 if values.get("n") is None else values["n"]
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST:
        raise ApiError(400, f"n: got {short(count)}; allowed: 1 to {MOST}.", "n")
    first = _picture(values)
    seed = first.get("seed", 0)
    if count > 1 and not isinstance(seed, int):
        raise ApiError(400, f"seed: got {short(seed)}; allowed: a whole number.", "seed")
    return [first | ({"seed": seed + number} if count > 1 else {}) for number in range(count)], str(form)


def video(body: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's request. Raises `ApiError`."""
    values = _flat(body, VIDEO)
    asked = _picture(values)
    frames = next((values[name] for name in ("frames", "num_frames") if values.get(name) is not None), None)
    if frames is None and values.get("seconds") is not None:
        frames = frames_for(values["seconds"])
    return asked | ({"frames": frames} if frames is not None else {})


def frames_for(seconds: Any) -> int:
    """4 n + 1 frames, as video models want them, that last about so long."""
    try:
        length = float(seconds) if isinstance(seconds, int | float | str) and not isinstance(seconds, bool) else -1.0
    except (ValueError, OverflowError):
        length = -1.0
    if not 0 < length <= 600:
        raise ApiError(400, f"seconds: got {short(seconds)}; allowed: above 0, at most 600.", "seconds")
    few = 4 * round(length * SLOW / 4) + 1
    return few if few < LONG else 4 * round(length * USUAL_FPS / 4) + 1


def _flat(body: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """`extra_body` beside the other keys, as clients that know it send it."""
    more = body.get("extra_body") or {}
    if not isinstance(more, dict):
        raise ApiError(400, f"extra_body: got {short(more)}; allowed: an object.", "extra_body")
    values = {**body, **more}
    for name in values:
        if name not in known:
            raise ApiError(400, f"{short(name)} is not known here.{nearest(name, known)} Known are {', '.join(known)}.", short(name), "unknown_parameter")
    return values


def _picture(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `Generate` that pictures and clips share; the engine looks at them more closely."""
    for name in ("model", "prompt"):
        if not values.get(name):
            raise ApiError(400, f"{name} is needed.", name, "missing_required_parameter")
    asked: dict[str, Any] = {"kind": "generate", "model": values["model"], "prompt": values["prompt"], "preview": False}
    asked |= {ours: values[theirs] for theirs, ours in SHARED.items() if values.get(theirs) is not None}
    size = values.get("size")
    if size not in (None, "auto"):
        found = SIZE.fullmatch(size) if isinstance(size, str) else None
        if found is None:
            raise ApiError(400, f"size: got {short(size)}; allowed: WIDTHxHEIGHT in pixels, such as 512x512, or auto.", "size")
        asked |= {"width": int(found[1]), "height": int(found[2])}
    return asked
