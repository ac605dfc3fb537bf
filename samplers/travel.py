"""Time travel: in a part of the run go back to more noise, with fresh noise, and walk again."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.errors import RecipeError
from hasten.samplers.solver import Solver

Shares = tuple[float, float]
"""alpha and sigma of a level: shares of data and of noise."""

TRAVELS = ("ddim", "euler", "dpm++")
"""Solvers that can begin anew in the middle of a run."""


class TimeTravel(Solver):
    """Walk a window of the run several times: `again` times after every `back` levels, from fresh noise on the old result.

    RePaint's resampling (arXiv 2201.09865, algorithm 1: jump length `back`, `again` + 1 walks) without a mask; Yume's TTS-SDE
    (arXiv 2507.17744) goes back in time in the sampler for the quality of whole clips, too. It costs evaluations and saves
    none: n steps become n + again * back * (places of the window at which it goes back). Going back from (alpha_s, sigma_s)
    to (alpha_t, sigma_t), t noisier: x_t = (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2) noise.

    begin, end: of the window, shares of the steps. back: levels to go back. again: how often at each place. The fields of
    `Solver` say what walks, one of ddim, euler (both: one evaluation a step) and dpm++; each walk begins at the first order.
    """

    kind: ClassVar[str] = "travel"
    name: str = "dpm++"  # type: ignore[assignment]
    begin: float = Field(0.3, ge=0, lt=1)
    end: float = Field(0.7, gt=0, le=1)
    back: int = Field(2, ge=1)
    again: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _goes_back(self) -> TimeTravel:
        if self.name not in TRAVELS:
            raise RecipeError(f"sampler.name must be one of {', '.join(TRAVELS)} to travel, got {self.name!r}")
        if self.begin >= self.end:
            raise RecipeError(f"sampler.end must be above begin = {self.begin}, got {self.end}")
        return self

    def plan(self, n: int) -> list[int]:
        """Numbers of the levels (0 all noise, n - 1 the last) in the order in which they are evaluated."""
        first, last = math.floor(self.begin * n + 0.5), math.floor(self.end * n + 0.5)
        left = dict.fromkeys(range(first + self.back, last + 1, self.back), self.again)
        order, level = list[int](), 0
        while level < n:
            order.append(level)
            level += 1
            if left.get(level, 0) and level < n:
                left[level] -= 1
                level -= self.back
        return order


def noisier(x: Tensor, at: Shares, to: Shares, noise: Tensor) -> Tensor:
    """x [...] of level `at` as it would have been at the noisier level `to`, given `noise` [...] of unit variance.

    With x = alpha data + sigma noise at `at`, the result has the shares of `to`, whatever the data. In float32.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = at, to
    carried = alpha_t / alpha_s
    fresh = math.sqrt(max(0.0, sigma_t**2 - (carried * sigma_s) ** 2))
    made: Tensor = carried * x.to(torch.float32) + fresh * noise
    return made.to(x.dtype)
