"""Which heights, widths and frame counts a pipeline can really make.

diffusers warns and rounds, or resizes, when a size does not fit; here that is an error with the sizes that do.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from typing import Any

from hasten.errors import LimitError

_SPACE = (
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
    "vae_scale_factor",
)
_TIME = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
_LITERAL = re.compile(r"height % (\d+)\b")


def side_multiple(pipe: Any) -> int:
    """What height and width must be divisible by: the autoencoder's factor times the network's patch,
    what the image processor rounds to, and the number the pipeline's own check names."""
    factor = _first(pipe, _SPACE)
    found = [factor * _patch(pipe)]
    for name in ("image_processor", "video_processor"):
        config = getattr(getattr(pipe, name, None), "config", {})
        found.append(int(config.get("vae_scale_factor", 1) or 1))
    check = getattr(type(pipe), "check_inputs", None)
    if check is not None:
        found += [int(number) for number in _LITERAL.findall(_source(check))]
    return math.lcm(*(number for number in found if number > 0))


def frame_step(pipe: Any) -> int:
    """Frame counts must be 1 more than a multiple of this; 1 when any number will do."""
    return _first(pipe, _TIME)


def check_size(pipe: Any, height: int | None, width: int | None, num_frames: int | None) -> None:
    """Raise `LimitError` with the nearest valid sizes unless `pipe` makes exactly this size."""
    multiple = side_multiple(pipe)
    if any(side is not None and side % multiple for side in (height, width)):
        asked = " x ".join(str(side) for side in (height, width) if side is not None)
        options = [
            " x ".join(str(choose(side, multiple)) for side in (height, width) if side is not None)
            for choose in (_below, _above)
        ]
        raise LimitError(
            f"{type(pipe).__name__} needs height and width divisible by {multiple}, got {asked}."
            f" Nearest: {' or '.join(dict.fromkeys(options))}."
        )
    step = frame_step(pipe)
    if num_frames is not None and step > 1 and (num_frames - 1) % step:
        low = (num_frames - 1) // step * step + 1
        raise LimitError(
            f"{type(pipe).__name__} needs 1 more than a multiple of {step} frames, got {num_frames}."
            f" Nearest: {low} or {low + step}."
        )


def _below(side: int, multiple: int) -> int:
    return max(multiple, side // multiple * multiple)


def _above(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _first(pipe: Any, names: tuple[str, ...]) -> int:
    """The first of these attributes that is a number, else 1."""
    for name in names:
        value = getattr(pipe, name, None)
        if isinstance(value, int | float) and value >= 1:
            return int(value)
    return 1


def _patch(pipe: Any) -> int:
    """Side of the network's patch in latent pixels: 1 for a UNet."""
    network = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    patch = getattr(getattr(network, "config", None), "patch_size", 1)
    patch = patch[-1] if isinstance(patch, list | tuple) and patch else patch
    return int(patch) if isinstance(patch, int | float) and patch >= 1 else 1


@functools.cache
def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
