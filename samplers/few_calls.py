"""A student's own way of sampling: a short list of noise levels, and how to go from one to the next."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hasten.errors import RecipeError
from hasten.recipe import Sampler


class FewCalls(Sampler):
    """Evaluate the network at these noise levels and no others, once each, whatever steps and guidance the caller asks for.

    how: `consistency` goes to the data and back with fresh noise (LCM, arXiv 2310.04378, algorithm 3); `ode` keeps the
    noise it sees (DDIM; Euler steps in flow matching). sigmas: share of noise of each call, falling from 1, for
    flow-matching models; timesteps: whole times of each call, falling, for variance-preserving ones. One of the two.
    guidance: what the network is told where guidance is one of its inputs (FLUX), None where it is not; there is no
    second branch in any case, since a student has its teacher's guidance inside.
    """

    kind: ClassVar[str] = "few-calls"
    how: Literal["consistency", "ode"] = "consistency"
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    guidance: float | None = Field(None, ge=0)

    @property
    def calls(self) -> int:
        """How often the network is evaluated."""
        return len(self.sigmas or self.timesteps or ())

    @model_validator(mode="after")
    def _one_falling_list(self) -> FewCalls:
        levels = self.sigmas or self.timesteps
        if not levels or (self.sigmas is not None and self.timesteps is not None):
            raise RecipeError("sampler needs either sigmas (flow matching) or timesteps (variance preserving), not empty")
        falling = all(a > b for a, b in pairwise(levels))
        if self.sigmas and not (falling and self.sigmas[0] == 1 and self.sigmas[-1] > 0):
            raise RecipeError(f"sampler.sigmas must fall from 1 and stay above 0, got {list(self.sigmas)}")
        if self.timesteps and not (falling and self.timesteps[-1] >= 0):
            raise RecipeError(f"sampler.timesteps must fall and stay at or above 0, got {list(self.timesteps)}")
        return self
