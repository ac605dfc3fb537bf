"""Generations of a small Wan pipeline, for tests of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.hosts import WAN_CALL

VIDEO = {**WAN_CALL, "num_inference_steps": 4}
SITES = [f"transformer.blocks.{number}.attn1" for number in range(2)]
"""Attention calls that may be sparse, with two layers."""


def generate(pipe: Any, call: dict[str, Any] = VIDEO, *, seed: int = 0, **changes: Any) -> Tensor:
    """Latents of one call."""
    changed = {**call, "output_type": "latent", "return_dict": False} | changes
    return pipe("a seven", generator=torch.Generator().manual_seed(seed), **changed)[0]


def off(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
