"""FasterCache's guidance cache: the unconditional output from the conditional one, by bands of spatial frequency."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.recipe import Guidance
from hasten.samplers.guidance import GuidanceState
from hasten.step import Step


class FrequencyGuidance(Guidance):
    """From share `after` on, restore u from c by the low and high bands of u - c (FasterCache, arXiv 2410.19355, 3.3).

    At a step where both are known d = u - c is split into a low band l (spatial frequencies up to `radius` times the
    shorter side, per frame) and a high band h = d - l. Later steps use u = c + a l + b h, with a = 1 + `low_gain`
    while `Step.time` >= `turn` and b = 1 + `high_gain` below it, else 1: guidance works on coarse things first and on
    details later. Gains are applied to what was measured, so they do not compound over skipped steps as they do in
    diffusers. A transform is linear, so bands of d are the differences of the bands of u and c: it runs only at
    steps where u is known.

    Bands are those of the last two dimensions of outputs shaped (batch, channels, [frames,] height, width). Outputs
    with fewer dimensions are packed tokens without a grid: d is then kept as one band, with gain 1.

    every: know u at each `every`-th evaluated step, 0 for never again.
    """

    kind: ClassVar[str] = "frequency"
    after: float = Field(0.33, ge=0, le=1)
    every: int = Field(5, ge=0)
    radius: float = Field(0.2, gt=0, le=1)
    low_gain: float = Field(0.1, ge=-1, le=1)
    high_gain: float = Field(0.1, ge=-1, le=1)
    turn: float = Field(0.3, ge=0, le=1)

    def start(self) -> GuidanceState:
        return _Frequency(self)


class _Frequency:
    def __init__(self, policy: FrequencyGuidance) -> None:
        self.policy = policy
        self.bands: tuple[Tensor, ...] = ()
        self.since = 0
        self.asked = -1

    def needs(self, step: Step) -> bool:
        if step.index != self.asked:
            self.asked, self.since = step.index, self.since + 1
        due = self.policy.every > 0 and self.since >= self.policy.every
        return due or not self.bands or step.index < self.policy.after * step.total

    def observe(self, step: Step, c: Tensor, u: Tensor) -> None:
        self.since = 0
        apart = u - c
        if apart.ndim < 4:
            self.bands = (apart,)
            return
        low = low_band(apart, self.policy.radius)
        self.bands = (low, apart - low)

    def estimate(self, step: Step, c: Tensor) -> Tensor:
        early = step.time >= self.policy.turn
        gains = (1 + self.policy.low_gain * early, 1 + self.policy.high_gain * (not early))
        if len(self.bands) == 1:
            gains = (1.0, 1.0)
        total = c.float()
        for gain, band in zip(gains, self.bands, strict=False):
            total = torch.add(total, band.float(), alpha=gain)
        return total.to(c.dtype)

    def tensors(self) -> list[Tensor]:
        return list(self.bands)


def low_band(x: Tensor, radius: float) -> Tensor:
    """`x` (..., height, width) without the waves that fit more than `radius` * min(height, width) times into it."""
    height, width = x.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=x.device).round()
    columns = torch.fft.rfftfreq(width, 1 / width, device=x.device).round()
    inside = rows[:, None] ** 2 + columns[None, :] ** 2 <= (radius * min(height, width)) ** 2
    spectrum = torch.fft.rfft2(x.float()) * inside
    found: Tensor = torch.fft.irfft2(spectrum, s=(height, width)).to(x.dtype)
    return found
