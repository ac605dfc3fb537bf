"""Arguments that many forwards share: times (all classes), text and grids of tokens (I to Z)."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.conformance.small import Inputs, normal

TEXT = 5
"""Text tokens of a prompt."""

GRIDS = ((4, 4), (4, 6))
"""Rows and columns of image tokens, by size."""

PIXELS = ((8, 8), (8, 12))
"""Height and width of latents, by size; patches of 2 x 2 give `GRIDS`."""


def tokens(size: int) -> int:
    """Image tokens."""
    return GRIDS[size][0] * GRIDS[size][1]


def unit(t: float) -> Tensor:
    """The time itself, in (0, 1]."""
    return torch.tensor([t])


def thousand(t: float) -> Tensor:
    """The time in steps of a thousand, as most schedulers count."""
    return torch.tensor([t * 1000])


def image(channels: int, seed: int, size: int) -> Tensor:
    """Latents of an image: (1, channels, height, width)."""
    return normal(seed, 1, channels, *PIXELS[size])


def video(channels: int, seed: int, size: int, frames: int = 2) -> Tensor:
    """Latents of a video: (1, channels, frames, height, width)."""
    return normal(seed, 1, channels, frames, *PIXELS[size])


def packed(channels: int, seed: int, size: int, frames: int = 1) -> Tensor:
    """Latents cut into tokens: (1, frames x rows x columns, channels)."""
    return normal(seed, 1, frames * tokens(size), channels)


def text(seed: int, width: int = 16) -> Tensor:
    """Features of a prompt: (1, TEXT, width)."""
    return normal(seed, 1, TEXT, width)


def prompt(seed: int, width: int = 16) -> Inputs:
    """The prompt where a forward asks for nothing else."""
    return {"encoder_hidden_states": text(seed, width)}


def everything(dtype: torch.dtype = torch.long) -> Tensor:
    """A mask of the prompt that hides nothing."""
    return torch.ones(1, TEXT, dtype=dtype)


def positions(size: int, *, frames: int = 1) -> Tensor:
    """(frame, row, column) of every image token: (frames x rows x columns, 3)."""
    rows, columns = GRIDS[size]
    axes = torch.arange(frames), torch.arange(rows), torch.arange(columns)
    return torch.cartesian_prod(*axes)


def joint_positions(size: int) -> Tensor:
    """Positions of the prompt, all on the diagonal, and after it of the image: (TEXT + tokens, 3)."""
    return torch.cat([torch.arange(TEXT)[:, None].expand(TEXT, 3), positions(size) + TEXT])
