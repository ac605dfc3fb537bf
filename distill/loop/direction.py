"""Which way a tangent points, from step to step, in so few numbers that a checkpoint can keep them.

A method hands out a sketch of its tangent, linear in it, so that parts of a batch and processes may be averaged like any number;
the loop turns it into one number for the log: its cosine with the running mean of the directions before it. Near 1: steps go on
where they went; about 0: what is left is noise; towards -1: every step has gone too far, and the next one comes back.

The sketch is a count sketch (Charikar, Chen, Farach-Colton, ICALP 2002, section 3): numbers are put in a fixed random order, get
fixed random signs, and every 64th is summed. Inner products come out right on average over signs; a cosine is wrong by about
1 / sqrt(64) = 0.125. Up to 64 numbers are not summed at all, and their cosines are exact.

Shapes: B rows; S = 64 numbers of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

NUMBERS = 64

KEEP = 0.9
"""Decay of the running mean of directions: about ten steps, so that it can turn as fast as a training does."""

TURN = "tangent.cosine"
"""The log's name for a tangent's cosine with those before it."""


class Sketch:
    """shape: of one row. The order and the signs are the same in every training and process."""

    def __init__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        g, size = torch.Generator().manual_seed(0), math.prod(shape)
        self._order = torch.randperm(size, generator=g).to(device)
        self._signs = (2 * torch.randint(2, (size,), generator=g) - 1).float().to(device)

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 [S], without gradient: of the mean of rows [B, ...] of any float dtype."""
        mean = rows.detach().flatten(1).mean(0, dtype=torch.float32)
        signed = mean[self._order] * self._signs
        return functional.pad(signed, (0, -len(signed) % NUMBERS)).view(-1, NUMBERS).sum(0)


class Headings:
    """Running means of directions, by name. held: those of a checkpoint."""

    def __init__(self, held: Mapping[str, Sequence[float]] | None = None) -> None:
        self.held = {name: list(values) for name, values in (held or {}).items()}

    def cosine(self, name: str, sketch: Sequence[float]) -> float | None:
        """Of this sketch with the running mean of those before it, which then follows. None for the first, and where there
        is no direction: neither of zeros has one."""
        size = math.hypot(*sketch)
        if not math.isfinite(size):
            return math.nan  # the loop says of which step
        if size == 0:
            return None
        unit, before = [value / size for value in sketch], self.held.get(name, [0.0] * len(sketch))
        self.held[name] = [KEEP * old + (1 - KEEP) * new for old, new in zip(before, unit, strict=True)]
        length = math.hypot(*before)
        return sum(old * new for old, new in zip(before, unit, strict=True)) / length if length else None


def numbers(told: Mapping[str, Tensor], flat: Tensor, headings: Headings) -> dict[str, float]:
    """What the log gets of these metrics, whose values lie one behind the other in `flat`: numbers are themselves, sketches
    become cosines."""
    found: dict[str, float | None] = {}
    for (name, metric), value in zip(told.items(), torch.split(flat, [t.numel() for t in told.values()]), strict=True):
        found[name] = headings.cosine(name, value.tolist()) if metric.ndim else float(value)
    return {name: value for name, value in found.items() if value is not None}
