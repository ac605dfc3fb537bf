"""Long clips from a network of short ones: it is asked about overlapping windows of frames, whose answers are blended.

Shapes: F latent frames of the clip; W windows of n frames each.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hasten.errors import RecipeError
from hasten.recipe import Sampler

Blend = Literal["linear", "flat", "cosine"]


class Windows(Sampler):
    """Evaluate windows of `frames` latent frames in place of the whole clip, `overlap` of them shared by neighbours.

    What windows say of a frame is averaged (MultiDiffusion, arXiv 2302.08113, eq. 5; along time: Gen-L-Video, arXiv
    2305.18264), with weights that fall towards a window's ends: `linear` or `cosine` over the overlap, or `flat`. Work and
    memory grow with the clip's length and not with its square, and each window is of the length that the network was
    trained for, with places counted from its own first frame (the sliding window at test time of Magic 1-For-1, arXiv
    2502.07701, goes through the clip window after window instead). moving: shift the windows by half their distance at
    every second step, so that their seams are not always at the same frames. noise: `own`, fresh in all frames; `shuffled`:
    frames behind the first window start from its noise in another order, so that windows resemble each other (FreeNoise,
    arXiv 2310.15169, section 4.1; there the order is random within windows, here within each window's length).
    at_once: how many windows one call of the network may hold; 0 for all of them. A clip of one window is the plain run.
    """

    kind: ClassVar[str] = "windows"
    frames: int = Field(9, ge=1)
    overlap: int = Field(4, ge=0)
    blend: Blend = "linear"
    moving: bool = False
    noise: Literal["own", "shuffled"] = "own"
    at_once: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _moves_on(self) -> Windows:
        if self.overlap >= self.frames:
            raise RecipeError(f"sampler.overlap must be less than sampler.frames ({self.frames}), got {self.overlap}")
        return self

    @property
    def distance(self) -> int:
        """Frames between the beginnings of neighbours, at most."""
        return self.frames - self.overlap


def starts(part: Windows, length: int, step: int = 0) -> tuple[int, ...]:
    """First frame of each window of a clip of `length` frames, which they cover; as even as whole numbers go.

    step: number of the evaluation, which moving windows follow. One window, from 0, where it holds the clip.
    """
    last = length - part.frames
    if last <= 0:
        return (0,)
    count = math.ceil(last / part.distance) + 1
    even = [round(i * last / (count - 1)) for i in range(count)]
    if not part.moving or step % 2 == 0:
        return tuple(even)
    between = [(a + b) // 2 for a, b in pairwise(even)]
    return tuple(dict.fromkeys([0, *between, last]))


def weights(part: Windows) -> tuple[float, ...]:
    """Weight of each frame of a window, above 0: what it says counts less towards its ends."""
    n, ramp = part.frames, part.overlap + 1
    if part.blend == "flat" or part.overlap == 0:
        return (1.0,) * n
    rising = [min(1.0, (min(i, n - 1 - i) + 1) / ramp) for i in range(n)]
    if part.blend == "linear":
        return tuple(rising)
    return tuple(math.sin(math.pi / 2 * share) ** 2 for share in rising)


def shares(part: Windows, length: int, begins: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    """Share of each window in each of its frames: over the windows of a frame they add up to 1."""
    own, total = weights(part), [0.0] * length
    for begin in begins:
        for i, weight in enumerate(own):
            total[begin + i] += weight
    return tuple(tuple(weight / total[begin + i] for i, weight in enumerate(own)) for begin in begins)
