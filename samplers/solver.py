"""The solver axis: walk the same path with another solver, on another number of steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from hasten.recipe import Sampler


class Solver(Sampler):
    """Replace the host's scheduler by diffusers' `name`, keeping the host's noise schedule and prediction type.

    name: euler, heun, ddim, unipc or dpm++; each has a flow-matching and a variance-preserving form,
    chosen from the host's scheduler. steps: share of the steps the caller asks for, 1 for all of them.
    """

    kind: ClassVar[str] = "solver"
    name: Literal["keep", "euler", "heun", "ddim", "unipc", "dpm++"] = "unipc"
    steps: float = Field(1.0, gt=0, le=1)
