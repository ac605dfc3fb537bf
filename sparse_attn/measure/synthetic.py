"""Heads without a model: queries, keys and values whose attention looks like that of video transformers.

For tests and benchmarks of sparse attention where no weights are at hand. A scene of moving objects before a divided
background gives every token its content; a head is a mixture of content and place. The six archetypes are those that
the papers on sparse video attention describe (spatial and temporal heads: Sparse VideoGen, arXiv 2502.01776, section 3;
semantic ones: arXiv 2505.18875, section 3); the generator itself is our own.

Shapes: H heads, S = frames * height * width tokens, D head dimension, W width of the content.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import UsageError, nearest

Grid = tuple[int, int, int]

WIDTH = 48
"""W: wide enough that random directions of two dozen segments are nearly orthogonal."""

DECAY = 0.6
"""Weight of one rotary frequency relative to the next higher one in what a head knows of places: heads that look at
neighbours use the high frequencies."""

BASE = 10_000.0
"""Base of the rotary frequencies, as in Wan, HunyuanVideo and Flux."""


@dataclass(frozen=True, slots=True)
class Head:
    """How one head attends.

    The defaults make a semantic head whose best fifth of the keys, in clusters, holds nine tenths of the mass. That is
    our choice, not a measurement of real models; what depends on it should be tried with other `sharpness` too.

    content: weight of what a token shows. place: weights of where it is, along frames, height and width; 0: the axis
    does not matter. rotate: content is rotated by place too, as rotary embeddings do in a real head. noise: what is
    left of a query or key that content and place do not explain, relative to the content. bias: norm of a vector that
    all keys share, relative to one key. sharpness: largest logit there can be, whatever D is; small ones make diffuse
    heads.
    """

    content: float = 1.0
    place: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotate: bool = False
    noise: float = 0.35
    bias: float = 0.5
    sharpness: float = 10.0


HEADS: dict[str, Head] = {
    "semantic": Head(),
    "semantic-rope": Head(rotate=True),
    "local3d": Head(content=0.3, place=(1.0, 1.0, 1.0), rotate=True, sharpness=16.0),
    "temporal": Head(content=0.3, place=(0.0, 1.0, 1.0), rotate=True, sharpness=16.0),
    "spatial": Head(content=0.5, place=(1.0, 0.0, 0.0), rotate=True, sharpness=18.0),
    "diffuse": Head(sharpness=3.0),
}
"""The archetypes by name."""

CLUSTERED = ("semantic", "semantic-rope")
"""Those whose attention follows what tokens show: the ones that clustering is for."""


def heads(
    grid: Grid, head_dim: int = 64, kinds: Sequence[str] | Mapping[str, Head] = tuple(HEADS), *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one head per name in `kinds`: float32 [1, H, S, D] each, to be scaled by D^-0.5.

    grid: frames, height, width in tokens. The same seed gives the same scene; a head depends on its name, the seed, the
    grid and D alone, so adding others changes nothing. Raises `UsageError` for an unknown name and for an odd D or one
    below 6 (every axis needs a pair of coordinates to rotate).
    """
    known = kinds if isinstance(kinds, Mapping) else HEADS
    for name in kinds:
        if name not in known:
            raise UsageError(f"There is no head {name!r}; known: {', '.join(HEADS)}.{nearest(name, HEADS)}")
    if head_dim % 2 or head_dim < 6:
        raise UsageError(
            f"Head dimension {head_dim} cannot be rotated along three axes; it must be even and at least 6."
        )
    if min(grid) < 1:
        raise UsageError(f"A grid has at least one token along each axis, got {grid} (frames, height, width).")
    shown = scene(grid, _generator("scene", seed))
    angles = rotary_angles(grid, head_dim)
    made = [_head(known[name], shown, angles, head_dim, _generator(name, seed)) for name in kinds]
    q, k, v = (torch.stack(parts)[None] for parts in zip(*made, strict=True))
    return q, k, v


def scene(
    grid: Grid, generator: torch.Generator, *, objects: int = 6, regions: int = 6, noise: float = 0.3
) -> Tensor:
    """What each token shows: float32 [S, W], rows of norm about 1.

    `objects` ellipses move in straight lines (and are reflected at the borders) before `regions` still parts of the
    background; each has a random direction of its own. A smooth field (light, depth) and white noise are added.
    """
    place = positions(grid) / torch.tensor([max(1, n - 1) for n in grid])
    waves = torch.randn(regions, 4, 2, generator=generator) * 5
    phases = torch.rand(regions, 4, generator=generator) * 2 * math.pi
    hills = (torch.einsum("sa,rwa->srw", place[:, 1:], waves) + phases).cos().sum(-1)
    segment = hills.argmax(-1)
    start, speed = (torch.rand(objects, 2, generator=generator) for _ in range(2))
    axes = 0.08 + 0.14 * torch.rand(objects, 2, generator=generator)
    for number in range(objects):
        path = start[number] + place[:, :1] * (speed[number] - 0.5)
        centre = 1 - (path % 2 - 1).abs()
        inside = (((place[:, 1:] - centre) / axes[number]) ** 2).sum(-1) < 1
        segment = torch.where(inside, regions + number, segment)
    looks = _unit(torch.randn(regions + objects, WIDTH, generator=generator))
    waves = torch.randn(8, 3, generator=generator) * 3
    field = (place @ waves.T + torch.rand(8, generator=generator) * 2 * math.pi).cos()
    field = field @ torch.randn(8, WIDTH, generator=generator) / math.sqrt(4 * WIDTH)
    white = torch.randn(place.shape[0], WIDTH, generator=generator) / math.sqrt(WIDTH)
    return looks[segment] + 0.35 * field + noise * white


def positions(grid: Grid) -> Tensor:
    """Frame, row and column of each token: float32 [S, 3]."""
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid)).view(-1, 3)


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs of coordinates rotated along frames, height and width: a third each, what is left over to the frames."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def rotary_angles(grid: Grid, head_dim: int) -> Tensor:
    """Angles of 3-D rotary position embedding: float32 [S, D / 2]."""
    place = positions(grid)
    parts = []
    for axis, pairs in enumerate(axis_pairs(head_dim)):
        frequencies = BASE ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
        parts.append(place[:, axis : axis + 1] * frequencies)
    return torch.cat(parts, 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., S, D] with each pair of neighbouring coordinates turned by its angle [S, D / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _head(
    head: Head, shown: Tensor, angles: Tensor, d: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One head of the scene `shown` [S, W]: q, k, v [S, D]."""
    shared = torch.randn(WIDTH, d, generator=generator) / math.sqrt(WIDTH)
    weights = torch.cat([w * DECAY ** torch.arange(n) for w, n in zip(head.place, axis_pairs(d), strict=True)])
    phase = torch.rand(d // 2, generator=generator) * 2 * math.pi
    # The same vector at every token; rotation makes it tell places apart.
    here = torch.stack([phase.cos(), phase.sin()], -1) * weights.sqrt()[:, None]
    here = here.flatten() / max(float(weights.sum()), 1e-9) ** 0.5 if float(weights.sum()) else torch.zeros(d)
    strength = math.sqrt(sum(head.place))
    sides = []
    for _ in range(2):
        own = torch.randn(WIDTH, d, generator=generator) / math.sqrt(WIDTH)
        seen = head.content * (_unit(shown @ (shared + 0.25 * own)) + _noise(shown, d, head.noise, generator))
        seen = rotate(seen, angles) if head.rotate else seen
        sides.append(seen + strength * rotate(here.expand(shown.shape[0], d), angles))
    length = math.sqrt(head.sharpness * math.sqrt(d))  # so that q.k / sqrt(D) reaches `sharpness`
    q, k = (_unit(side) * length for side in sides)
    k = k + head.bias * length * _unit(torch.randn(d, generator=generator))
    v = shown @ torch.randn(WIDTH, d, generator=generator) + 0.3 * torch.randn(shown.shape[0], d, generator=generator)
    return q, k, v


def _noise(like: Tensor, d: int, size: float, generator: torch.Generator) -> Tensor:
    return size * torch.randn(like.shape[0], d, generator=generator) / math.sqrt(d)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed((zlib.crc32(name.encode()) << 16) + seed)
