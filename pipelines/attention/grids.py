"""Frames, height and width of latents that a network is given as a sequence of tokens: what its other arguments say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from hasten.pipelines.host import Call

Grid = tuple[int, int, int]

FRAMES = ("num_frames", "frames", "latent_frames")
"""What forwards call the number of latent frames, beside `height` and `width`."""


def grids_of(call: Call, tokens: int, start: int, length: int) -> list[Grid]:
    """The pictures that `tokens` of the latents consist of, the generated one first; empty where nothing tells.

    They stand from `start` on in a sequence of `length`, for arguments that are about all of it.
    """
    arguments = call.arguments()
    for found in (*_by_shapes(arguments), *_by_sizes(arguments), *_by_positions(arguments, tokens, start, length)):
        if sum(map(math.prod, found)) == tokens:
            return found
    return []


def _by_shapes(arguments: dict[str, Any]) -> Iterator[list[Grid]]:
    """A list of (frames, height, width), or one such list for each sample (Qwen-Image)."""
    shapes = arguments.get("img_shapes")
    while isinstance(shapes, list) and shapes and isinstance(shapes[0], list):
        shapes = shapes[0]
    if isinstance(shapes, list) and all(len(shape) == 3 for shape in shapes):
        yield [(int(f), int(h), int(w)) for f, h, w in shapes]


def _by_sizes(arguments: dict[str, Any]) -> Iterator[list[Grid]]:
    """Numbers (LTX-Video)."""
    frames = next((arguments[name] for name in FRAMES if isinstance(arguments.get(name), int)), 1)
    height, width = arguments.get("height"), arguments.get("width")
    if isinstance(height, int) and isinstance(width, int):
        yield [(frames, height, width)]


def _by_positions(arguments: dict[str, Any], tokens: int, start: int, length: int) -> Iterator[list[Grid]]:
    """Whole numbers for each token, such as (picture, row, column) (Flux). Read once for each kind of call."""
    for value in arguments.values():
        if not isinstance(value, Tensor) or value.dim() not in (2, 3):
            continue
        first = {tokens: 0, length: start}.get(value.shape[-2])
        if first is None:
            continue
        if not 2 <= value.shape[-1] <= 4:
            continue
        ids = (value if value.dim() == 2 else value[0])[first : first + tokens].detach().double().cpu()
        if bool((ids == ids.round()).all()):
            yield pictures([tuple(map(int, row)) for row in ids.tolist()])


def pictures(ids: list[tuple[int, ...]]) -> list[Grid]:
    """The pictures of consecutive tokens with positions `ids`, the last two varying coordinates row and column."""
    varying = [axis for axis in range(len(ids[0])) if len({row[axis] for row in ids}) > 1]
    if not varying:
        return []
    row_axis, column_axis = varying[-2] if len(varying) > 1 else None, varying[-1]
    outer = [axis for axis in varying if axis not in (row_axis, column_axis)]
    found: list[Grid] = []
    for _, run in itertools.groupby(ids, key=lambda row: [row[axis] for axis in outer]):
        frame = list(run)
        rows = sorted({row[row_axis] for row in frame}) if row_axis is not None else [0]
        columns = sorted({row[column_axis] for row in frame})
        expected = list(itertools.product(rows, columns))
        if [(row[row_axis] if row_axis is not None else 0, row[column_axis]) for row in frame] != expected:
            return []
        found.append((1, len(rows), len(columns)))
    if len(found) > 1 and any(math.prod(grid) == 1 for grid in found):
        return []  # numbers of something else
    alike = len(set(found)) == 1 and len(found) > 1
    return [(len(found), *found[0][1:])] if alike else found

