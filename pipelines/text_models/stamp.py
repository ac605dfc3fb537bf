"""Is this the model that something was trained for? A few weights of every parameter tell, in any precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLES = 4
"""Weights taken of every parameter, at even distances."""
ROUNDING, TINY = 2**-8, 2**-23
"""What two roundings to 16 bits may differ by: bfloat16 by 2^-9 of the value, float16 by 2^-25 near zero; and a margin."""


def stamp(model: nn.Module) -> Tensor:
    """Weights of `model`, float32 [n]; NaN for those that are not there (offloaded).

    A hash would be another one after loading in half precision; these numbers only have to be compared with `same`.
    """
    parts = [_some(value) for _, value in sorted(model.named_parameters()) if value.numel()]
    return torch.cat(parts) if parts else torch.zeros(0)


def same(one: Tensor, other: Tensor) -> bool:
    """Are two stamps of one model, up to the rounding to 16 bits? No where nothing of both is known."""
    if one.shape != other.shape:
        return False
    known = one.isfinite() & other.isfinite()
    near = (one - other).abs() <= ROUNDING * torch.maximum(one.abs(), other.abs()) + TINY
    return bool(known.any() and near[known].all())


def _some(value: Tensor) -> Tensor:
    if value.is_meta:
        return torch.full((SAMPLES,), float("nan"))
    at = torch.arange(SAMPLES, device=value.device) * value.numel() // SAMPLES
    found: Tensor = value.detach().flatten()[at].float().cpu()
    return found
