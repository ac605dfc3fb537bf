"""A signal that looks at what is data in the latents and past what is noise."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.signals import Signal, SignalState
from hasten.drift import relative_l1
from hasten.level import SMALLEST, Level
from hasten.step import Step


class SpectralChange(Signal):
    """Relative L1 change, since the previous step, of the latents behind a filter that lets data pass and holds noise.

    SeaCache (arXiv 2602.18993): with data of power |f|^-p and white noise the best linear estimate of the data from
    x = alpha data + sigma noise has the gain (Wiener) g(f) = alpha |f|^-p / (alpha^2 |f|^-p + sigma^2). The product of
    the gains of the axes, divided by its mean, is applied to x. Differs: alpha and sigma come from the solver, so
    variance-preserving models are treated as such and not as flow; several images of a batch are one signal.

    x: (B, C, H, W) or (B, C, F, H, W), or tokens (B, N, C), whose order counts as one axis. Unknown (None, so the
    step is computed) where the solver has no noise level. One pair of FFTs of the latents per step.

    power: p, 3 in the paper for video.
    """

    kind: ClassVar[str] = "spectral_change"
    power: float = Field(3.0, gt=0, le=8)

    def start(self) -> SignalState:
        return _SpectralChange(self.power)


class _SpectralChange:
    def __init__(self, power: float) -> None:
        self.power = power
        self.previous: Tensor | None = None

    def measure(self, step: Step, x: Tensor) -> Tensor | None:
        if step.level is None:
            self.previous = None
            return None
        previous, self.previous = self.previous, denoised(x, step.level, self.power)
        return None if previous is None or previous.shape != x.shape else relative_l1(self.previous, previous)

    def observe(self, step: Step, x: Tensor, y: Tensor) -> None:
        return None

    def tensors(self) -> list[Tensor]:
        return [] if self.previous is None else [self.previous]


def denoised(x: Tensor, level: Level, power: float) -> Tensor:
    """`x` behind the filter of `level`, float32 of the same shape; its gains have mean 1 over all frequencies."""
    dims = tuple(range(2, x.ndim)) if x.ndim > 3 else (1,)
    gain = torch.ones((), device=x.device)
    for dim in dims:
        shape = [1] * x.ndim
        shape[dim] = x.shape[dim]
        gain = gain * wiener_gain(torch.fft.fftfreq(x.shape[dim], device=x.device), level, power).reshape(shape)
    spectrum = torch.fft.fftn(x.float(), dim=dims)
    filtered: Tensor = torch.fft.ifftn(spectrum * (gain / gain.mean()), dim=dims).real
    return filtered


def wiener_gain(frequency: Tensor, level: Level, power: float) -> Tensor:
    """alpha / (alpha^2 + sigma^2 |f|^power): the gain of the class above with both sides times |f|^power."""
    alpha = max(level.alpha, SMALLEST)
    return alpha / (alpha**2 + level.sigma**2 * frequency.abs().pow(power))
