"""What of an output is kept and forecast: the output itself, its distance from the input, or the data it implies."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hasten.step import Step

Of = Literal["output", "residual", "data"]


def coefficients(of: Of, step: Step) -> tuple[float, float] | None:
    """(a, b) of the target a x + b y; None where the solver does not say what the output implies."""
    if of == "output":
        return 0.0, 1.0
    if of == "residual":
        return -1.0, 1.0
    return None if step.level is None else step.level.data


def to_target(of: Of, step: Step, x: Tensor, y: Tensor) -> Tensor | None:
    """a x + b y, a new tensor of y's shape; None when there are no coefficients.

    The dtype is y's, but at least float32 for "data", whose way back divides by the noise level. Where x and y
    differ in one dimension only (a variance beside the mean, a mask beside the latents) the shared part is
    transformed and the rest of y kept; where they differ in more, y is kept as it is.
    """
    pair = coefficients(of, step)
    if pair is None:
        return None
    wide = y.to(torch.promote_types(y.dtype, torch.float32)) if of == "data" else y
    return _plus(wide, x, *pair)


def from_target(of: Of, step: Step, x: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The y of `dtype` that has this target at the present input x; None when there is none."""
    pair = coefficients(of, step)
    if pair is None or pair[1] == 0:
        return None
    return _plus(target, x, -pair[0] / pair[1], 1 / pair[1]).to(dtype)


def _plus(y: Tensor, x: Tensor, a: float, b: float) -> Tensor:
    """b y + a x on the part that both have, the rest of y unchanged; always a new tensor, because hosts update
    theirs in place."""
    result = y.clone()
    unequal = [d for d in range(y.ndim) if x.ndim == y.ndim and x.shape[d] != y.shape[d]]
    if a == 0 and b == 1 or x.ndim != y.ndim or len(unequal) > 1:
        return result
    dim = unequal[0] if unequal else 0
    num = min(x.shape[dim], y.shape[dim])
    part = result.narrow(dim, 0, num)
    part.mul_(b).add_(x.narrow(dim, 0, num), alpha=a)
    return result
