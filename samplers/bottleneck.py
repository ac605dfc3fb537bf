"""Several resolutions in one run: full at its beginning and its end, lower in between.

Progress is a place in the run as the host itself would walk it: 0 at its first noise level, 1 at no noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hasten.errors import RecipeError
from hasten.part import Part
from hasten.recipe import Sampler


class Stage(Part):
    """A stretch of the run at one resolution: from progress `begin` to `until`, in a share `steps` of the steps asked for.

    scale: of height and width; frames: of the latent frames after the first. shift: factor on sigma / alpha at each level
    of the stage, as a flow's shift is, so that more of its steps are at high noise for shift > 1.
    """

    steps: float = Field(gt=0, le=1)
    begin: float = Field(0.0, ge=0, lt=1)
    until: float = Field(1.0, gt=0, le=1)
    scale: float = Field(1.0, gt=0, le=1)
    frames: float = Field(1.0, gt=0, le=1)
    shift: float = Field(1.0, gt=0)


HIGH_LOW_HIGH = (
    Stage(steps=0.1, begin=0.0, until=0.1),
    Stage(steps=0.4, begin=0.05, until=0.75, scale=0.5),
    Stage(steps=0.2, begin=0.6, until=1.0),
)


class Bottleneck(Sampler):
    """Bottleneck Sampling (arXiv 2503.18940): high, low, high resolution, with new noise where the resolution changes.

    At the end of a stage the data are estimated, resized, and given the noise of the next stage's first level, which may
    lie before the place where the stage ended: then the run goes back a little, and the next stage repairs what resizing
    did. noise: `fresh`, as in the paper; or `kept`: a stage of a size that was walked before takes up the noise that was
    left there, so that the result stays nearer to the plain run's. order: of the solver, within a stage.
    positions: what a network that is told the places of its tokens (FLUX) is told of the low resolution: `own` counts
    from 0, as for a small picture; `stretched` are the places in the full one. Differs from the paper: the shares, scales
    and shifts are the recipe's (the paper sets them per model), and the solver is of second order.
    """

    kind: ClassVar[str] = "bottleneck"
    stages: tuple[Stage, ...] = HIGH_LOW_HIGH
    order: Literal[1, 2] = 2
    noise: Literal["fresh", "kept"] = "fresh"
    positions: Literal["own", "stretched"] = "own"

    @model_validator(mode="after")
    def _one_way_through(self) -> Bottleneck:
        if not self.stages:
            raise RecipeError("sampler.stages is empty; one stage is the least: begin 0, until 1")
        first, last = self.stages[0], self.stages[-1]
        if first.begin or last.until != 1:
            raise RecipeError(f"sampler.stages must go from 0 to 1, got {first.begin:g} to {last.until:g}")
        for name, stage in (("first", first), ("last", last)):
            if stage.scale != 1 or stage.frames != 1:
                raise RecipeError(f"the {name} of sampler.stages must be of full size (scale and frames 1), got {stage}")
        if any(stage.begin >= stage.until for stage in self.stages):
            raise RecipeError("each of sampler.stages must begin before it ends")
        if any(after.begin > before.until for before, after in pairwise(self.stages)):
            raise RecipeError("each of sampler.stages must begin where the one before ends, or earlier: else noise is skipped")
        return self


@dataclass(frozen=True, slots=True)
class Node:
    """An evaluation: of which stage, at which progress, and whether it is the stage's last."""

    stage: int
    progress: float
    last: bool


def nodes(part: Bottleneck, steps: int) -> tuple[Node, ...]:
    """The evaluations of a run that was asked to take `steps`; each stage has one at least."""
    found = []
    for number, stage in enumerate(part.stages):
        count = max(1, round(stage.steps * steps))
        reach = stage.until - stage.begin
        found += [Node(number, stage.begin + reach * i / count, i == count - 1) for i in range(count)]
    return tuple(found)
