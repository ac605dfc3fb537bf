"""Settings back from a file that somebody drops on the page: PNG, MP4 or GIF of hasten, JSON or YAML. Files may be anybody's.

Sizes are read from headers before anything is decoded, and nothing is: the description stands in the metadata. There are no
archives and no pickles.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.errors import RecipeError, UsageError
from hasten.ui.engine.limits import Limits, RequestError
from hasten.ui.engine.request import Request, read

LINE = re.compile(r"^# hasten-request: (\{.*\})$", re.MULTILINE)
"""How an exported YAML file carries the whole request."""

ACCEPTED = "a PNG, MP4 or GIF that hasten made, a JSON file or a YAML recipe"
ALIKE = {
    "prompt": "prompt", "negative_prompt": "negative", "seed": "seed", "model": "model", "steps": "steps", "guidance_scale": "guidance",
    "recipe": "recipe", "width": "width", "height": "height", "frames": "frames",
}  # fmt: skip
"""Keys of a file's description -> those of a request."""


TRIED_ON = {"text diffusion": ("text", "tiny-dllm")}
"""What a recipe alone is tried on -> kind of request and model; of others a video."""


def restore(data: bytes, limits: Limits, folder: Path) -> Request:
    """The request that made the file. folder: where it may be written for a moment. Raises `RequestError` in words."""
    if len(data) > limits.max_upload:
        raise RequestError("file", f"{len(data):,} bytes", f"at most {limits.max_upload:,} bytes", "Choose a smaller one.")
    if data.startswith((b"\x89PNG\r\n\x1a\n", b"GIF8")) or data[4:8] == b"ftyp":
        _check_size(data, limits)
        return _of_facts(_described(data, folder), limits)
    if data.startswith((b"PK\x03\x04", b"\x1f\x8b", b"7z", b"\x80")) or b"\x00" in data[:1024]:
        raise RequestError("file", "an archive, a pickle or something else that is no text", ACCEPTED, "Unpack it where you trust it.")
    return _of_text(data, limits)


def _check_size(data: bytes, limits: Limits) -> None:
    """Of a picture, by its header."""
    if data[:4] == b"\x89PNG" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
    elif data[:4] == b"GIF8" and len(data) >= 10:
        width, height = struct.unpack("<HH", data[6:10])
    else:
        return
    if width * height > limits.max_pixels_read:
        raise RequestError("file", f"{width:,} x {height:,} pixels", f"at most {limits.max_pixels_read:,} pixels", "Choose another file.")


def _described(data: bytes, folder: Path) -> dict[str, Any]:
    """The description in a picture or clip."""
    from hasten.pipelines.media import read_metadata

    with tempfile.NamedTemporaryFile(dir=folder, prefix=".upload-", suffix=".part") as file:
        file.write(data)
        file.flush()
        try:
            return read_metadata(file.name)
        except UsageError as error:
            said = str(error).replace(file.name, "the file")
            raise RequestError("file", "a damaged picture or clip", ACCEPTED, said) from None


def _of_facts(facts: Mapping[str, Any], limits: Limits) -> Request:
    """From `request` where it is there, else from the keys that `hasten generate` writes."""
    if isinstance(facts.get("request"), Mapping):
        return read(facts["request"], limits)
    if not facts.get("prompt") or "model" not in facts:
        raise RequestError("file", ", ".join(facts) or "no description", ACCEPTED, "Its maker left the settings out, or was another program.")
    values = {ours: facts[theirs] for theirs, ours in ALIKE.items() if facts.get(theirs) not in (None, "")}
    if values.get("frames") == 1:
        del values["frames"]
    return read({"kind": "generate", **values}, limits)


def _of_text(data: bytes, limits: Limits) -> Request:
    if len(data) > limits.max_request:
        raise RequestError("file", f"{len(data):,} bytes of text", f"at most {limits.max_request:,} bytes", "Choose a smaller one.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError("file", "bytes that are no text", ACCEPTED) from None
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise RequestError("file", "broken JSON", ACCEPTED, "Choose an undamaged file.") from None
        return _of_facts(found, limits) if "kind" not in found or "request" in found else read(found, limits)
    if line := LINE.search(text):
        return read(line[1], limits)
    return _of_recipe(text, limits)


def _of_recipe(text: str, limits: Limits) -> Request:
    """A recipe says nothing of a prompt: it is tried on a bundled model with one of its own."""
    from hasten.pipelines import tiny_models
    from hasten.pipelines.recipes import acts_on
    from hasten.ui.engine.recipes import parsed

    try:
        found = parsed(text)
        kind, model = ("decode", "tiny-lm") if found.draft is not None else TRIED_ON.get(acts_on(found), ("generate", "tiny-video"))
    except RecipeError as error:
        raise RequestError("file", text, ACCEPTED, str(error)) from None
    return read({"kind": kind, "model": model, "prompt": tiny_models.card(model)["prompts"][0], "recipe": text}, limits)
