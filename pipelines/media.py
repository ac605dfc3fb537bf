"""Frames to PNG, MP4 or GIF files that say how they were made, and back to that description.

Nothing is resized, clipped or dropped silently. Files are written whole or not at all (`hasten.atomic`).
PyAV and Pillow are used directly: imageio's FFmpeg writer resizes to multiples of 16, and its PyAV writer
sets neither the quality nor the colour matrix.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import av
import imageio.v3 as imageio
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from hasten.atomic import replacing
from hasten.errors import OutputError, UsageError, nearest
from hasten.metrics import as_frames
from hasten.recipe import Recipe

SUFFIXES = (".png", ".mp4", ".gif")
MAX_METADATA_BYTES = 1024 * 1024
"""Largest description written or read: files may come from strangers."""

FASTSTART = {"movflags": "+faststart"}
"""Puts the index in front, so that browsers play before the whole file has arrived."""
_MARK = "hasten"
_VERSION = 1
_TEXT_NAMES = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "model": "Model",
}
"""Our keys -> the names of A1111's `parameters` text, which other tools read."""


def save(
    frames: Any,
    path: Path | str,
    *,
    fps: float = 16.0,
    metadata: Mapping[str, Any] | None = None,
    crf: int = 17,
) -> list[Path]:
    """Write frames to `path`; its suffix chooses the format. Returns the files that were written.

    frames: PIL images, numpy or torch, as `hasten.metrics.as_frames` takes them: channel-last, uint8 or
        floating point in [0, 1] (rounded to 8 bits here).
    .png: one image, or `name-000.png`, `name-001.png`, ... for several; all of them or none.
    .mp4: H.264, yuv420p, BT.709, `crf` 0 (lossless but for colour sampling) to 51. Odd sides are padded by
        repeating the last row or column, with a warning; the original size stands in the metadata.
    .gif: 256 colours per frame; times are rounded to hundredths of a second, the total stays right.
    fps: frames per second; GIF at most 50.
    metadata: JSON values under any keys; `prompt, negative_prompt, seed, model, recipe` (a `Recipe` or its
        YAML), `versions, steps, guidance_scale` are understood by other tools too. `width, height, frames`
        and `fps` are added. None writes no metadata at all.

    Raises `UsageError` for frames, names or metadata that cannot be written, `OutputError` for the disk.
    """
    target, suffix = Path(path), _suffix(Path(path))
    if suffix != ".png":
        _check_fps(fps, highest=50.0 if suffix == ".gif" else 240.0)
    images = _to_uint8(as_frames(frames))
    padding = _odd_padding(images) if suffix == ".mp4" else None
    facts = None if metadata is None else _facts(metadata, images, fps if suffix != ".png" else None, padding)
    if suffix == ".png":
        return _save_png(images, target, facts)
    _refuse_transparency(images, suffix)
    with replacing(target) as aside:
        if suffix == ".gif":
            _encode_gif(images, aside, fps, facts)
        else:
            _encode_mp4(_pad(images, padding), aside, fps, crf, facts)
    return [target]


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The metadata that `save` put into a PNG, MP4 or GIF file; an empty dict when there is none.

    The format is told from the content, not the name. What another tool wrote is given as it stands under
    `parameters` (PNG) or `comment`. Raises `UsageError` for a file that is missing, damaged or of another kind.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            head = stream.read(12)
        if head.startswith((b"\x89PNG\r\n\x1a\n", b"GIF8")):
            return _read_image(file)
        if head[4:8] == b"ftyp":
            return _read_mp4(file)
    except (OSError, SyntaxError, ValueError, av.FFmpegError, Image.DecompressionBombError) as error:
        if isinstance(error, UsageError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"Cannot read {file}: {reason}. Choose an undamaged PNG, MP4 or GIF file.") from None
    raise UsageError(f"Cannot read metadata from {file}: it is none of PNG, MP4 and GIF. Choose such a file.")


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return suffix
    raise UsageError(
        f"Cannot tell the format of {path}: the suffix is {path.suffix!r}; allowed: {', '.join(SUFFIXES)}."
        f"{nearest(suffix, SUFFIXES)}"
    )


def _check_fps(fps: float, highest: float) -> None:
    if not (math.isfinite(fps) and 0.1 <= fps <= highest):
        raise UsageError(f"fps must lie between 0.1 and {highest:g} for this format, got {fps}. Try 16.")


def _to_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    """(F, H, W, C) in 0..255. `as_frames` allows a rounding error around [0, 1], hence the clip."""
    if images.dtype == np.uint8:
        return images
    rounded: NDArray[np.uint8] = np.rint(np.clip(images.astype(np.float32), 0.0, 1.0) * 255.0).astype(
        np.uint8
    )
    return rounded


def _refuse_transparency(images: NDArray[np.uint8], suffix: str) -> None:
    if images.shape[-1] == 4:
        raise UsageError(
            f"{suffix} holds no transparency here. Save as .png, or drop it with frames[..., :3]."
        )


# -- metadata ----------------------------------------------------------------------------------------------


def _facts(
    metadata: Mapping[str, Any], images: NDArray[np.uint8], fps: float | None, padding: tuple[int, int] | None
) -> dict[str, Any]:
    """What is stored: the caller's keys, a format version, and the size of the frames as generated."""
    frames, height, width, _ = images.shape
    facts: dict[str, Any] = {_MARK: _VERSION, **metadata, "width": width, "height": height, "frames": frames}
    if fps is not None:
        facts["fps"] = fps
    if padding is not None and any(padding):
        facts["padding"] = list(padding)
    if isinstance(facts.get("recipe"), Recipe):
        facts["recipe"] = facts["recipe"].to_yaml()
    try:
        size = len(_to_json(facts))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"Metadata must be plain JSON values: {error}. Convert them to text or numbers."
        ) from None
    if size > MAX_METADATA_BYTES:
        raise UsageError(f"Metadata may have at most {MAX_METADATA_BYTES:,} bytes, got {size:,}. Shorten it.")
    return facts


def _to_json(facts: Mapping[str, Any]) -> str:
    """Strict, ASCII-only JSON: every container and every reader keeps ASCII as it is."""
    return json.dumps(facts, allow_nan=False)


def _from_json(text: str, otherwise: str) -> dict[str, Any]:
    """The dict that `_facts` made, or `{otherwise: text}` when another tool wrote `text`."""
    if not text:
        return {}
    try:
        facts = json.loads(text) if len(text) <= MAX_METADATA_BYTES else None
    except (ValueError, RecursionError):
        facts = None
    if isinstance(facts, dict) and facts.get(_MARK) == _VERSION:
        return {key: value for key, value in facts.items() if key != _MARK}
    return {otherwise: text}


def _parameters(facts: Mapping[str, Any]) -> str:
    """A1111's `parameters` text: prompt, negative prompt, then `Name: value` pairs on the last line."""
    lines = [str(facts.get("prompt", ""))]
    if facts.get("negative_prompt"):
        lines.append(f"Negative prompt: {facts['negative_prompt']}")
    pairs = [(name, facts[key]) for key, name in _TEXT_NAMES.items() if facts.get(key) is not None]
    pairs.append(("Size", f"{facts['width']}x{facts['height']}"))
    versions = facts.get("versions")
    version = versions.get("hasten", "") if isinstance(versions, Mapping) else ""
    pairs.append(("Version", f"hasten {version}".strip()))
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """As A1111 does it: a value that could be mistaken for the next pair is written as a JSON string."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def _read_image(file: Path) -> dict[str, Any]:
    try:
        with Image.open(file, formats=("PNG", "GIF")) as image:
            info = dict(image.info)
    except UnidentifiedImageError:
        raise UsageError(f"Cannot read {file}: the image is damaged. Choose an undamaged file.") from None
    if isinstance(info.get(_MARK), str):
        return _from_json(info[_MARK], otherwise="comment")
    if isinstance(info.get("parameters"), str):
        return {"parameters": info["parameters"]}
    comment = info.get("comment", b"")
    return _from_json(
        comment.decode("utf-8", "replace") if isinstance(comment, bytes) else comment, "comment"
    )


def _read_mp4(file: Path) -> dict[str, Any]:
    # An open file and a fixed format: FFmpeg must not follow a playlist or an address in a stranger's file.
    with file.open("rb") as stream, av.open(stream, format="mp4") as container:
        return _from_json(container.metadata.get("comment", ""), otherwise="comment")


# -- encoders ----------------------------------------------------------------------------------------------


def _save_png(images: NDArray[np.uint8], target: Path, facts: dict[str, Any] | None) -> list[Path]:
    text = PngInfo()
    if facts is not None:
        text.add_text("parameters", _parameters(facts))
        text.add_text(_MARK, _to_json(facts))
    digits = max(3, len(str(len(images) - 1)))
    paths = [target.with_name(f"{target.stem}-{i:0{digits}}{target.suffix}") for i in range(len(images))]
    paths = paths if len(images) > 1 else [target]
    with ExitStack() as stack:
        for image, path in zip(images, paths, strict=True):
            aside = stack.enter_context(replacing(path))
            imageio.imwrite(aside, _grey_or_colour(image), plugin="pillow", extension=".png", pnginfo=text)
    return paths


def _grey_or_colour(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image[..., 0] if image.shape[-1] == 1 else image


def _encode_gif(images: NDArray[np.uint8], aside: Path, fps: float, facts: dict[str, Any] | None) -> None:
    # Rounding the end of each frame rather than its length keeps the total duration right.
    ends = [round(100 * (i + 1) / fps) for i in range(len(images))]
    lengths = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    extra = {} if facts is None else {"comment": _to_json(facts).encode()}
    # Pillow itself, because imageio's GIF writer takes one length for all frames.
    first, *rest = [Image.fromarray(_grey_or_colour(image)) for image in images]
    first.save(aside, format="GIF", save_all=True, append_images=rest, duration=lengths, loop=0, **extra)


def _odd_padding(images: NDArray[np.uint8]) -> tuple[int, int]:
    """(right, bottom) columns and rows that yuv420p needs for even sides; warns when there are any."""
    height, width = images.shape[1:3]
    right, bottom = width % 2, height % 2
    if right or bottom:
        warnings.warn(
            f"H.264 needs even sides: {width} x {height} is padded to {width + right} x {height + bottom} by"
            " repeating the last row or column. Save as .png to keep the exact size.",
            stacklevel=3,
        )
    return right, bottom


def _pad(images: NDArray[np.uint8], padding: tuple[int, int] | None) -> NDArray[np.uint8]:
    right, bottom = padding or (0, 0)
    return (
        np.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge") if right or bottom else images
    )


def _encode_mp4(images: NDArray[np.uint8], aside: Path, fps: float, crf: int, facts: Any) -> None:
    _, height, width, _ = images.shape
    try:
        opened: Any = imageio.imopen  # its stubs do not know that the plugin hands `options` on to PyAV
        with opened(aside, "w", plugin="pyav", extension=".mp4", container="mp4", options=FASTSTART) as file:
            if facts is not None:
                file.container_metadata["comment"] = _to_json(facts)
            file.init_video_stream("libx264", fps=float(fps), pixel_format="yuv420p")
            _set_up(file._video_stream, width, height, crf)
            # The matrix that the tags promise; without both, players guess it from the size.
            file.set_video_filter(
                [("scale", {"out_color_matrix": "bt709", "out_range": "tv"}), ("format", "yuv420p")]
            )
            for image in images:
                file.write_frame(np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image)
    except av.codec.codec.UnknownCodecError:
        raise OutputError(
            "This PyAV has no H.264 encoder. Reinstall it (pip install --force-reinstall av) or save as .gif."
        ) from None
    except av.FFmpegError as error:
        if error.errno is None or error.errno <= 0:
            raise OutputError(
                f"Cannot encode {width} x {height} as H.264: {error}. Save as .png instead."
            ) from error
        raise


def _set_up(stream: Any, width: int, height: int, crf: int) -> None:
    """What imageio's `init_video_stream` has no argument for: size, quality and colour tags."""
    stream.width, stream.height, stream.options = width, height, {"crf": str(crf)}
    codec = stream.codec_context
    codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
    codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
