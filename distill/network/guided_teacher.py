"""The teacher of a training: guided, by a scale that is drawn for each row, and that the student may be told.

Shapes: B rows; x, F [B, ...]; tau, s float64 [B].
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts
from hasten.distill.network.hint import Hint, Hinted
from hasten.distill.network.roles import Guided, Role
from hasten.errors import RecipeError


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int | float) else value


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] <= value[1]:
        raise RecipeError(f"scale must be a number of at least 0, or a range that rises, got {value[0]:g} and {value[1]:g}.")
    return value


Scale = Annotated[tuple[float, float], BeforeValidator(_pair), AfterValidator(_rising)]
"""Guidance scales s of u + s (c - u), from lowest to highest; one number stands for itself alone. 1 is no guidance."""


def check_told(scale: tuple[float, float], told: bool) -> None:
    """Raises `RecipeError` for a student that is to hear a number which never changes."""
    if told and scale[0] == scale[1]:
        raise RecipeError(f"told = true needs a range of guidance scales, got {scale[0]:g} alone. Set told = false.")


class GuidedTeacher:
    """What the teacher says, and the student as it is told by how much the teacher is guided.

    told: whether the student hears the scale (`hint.py`); one that does not learns the mean over the range.
    """

    def __init__(self, facts: Facts, scale: tuple[float, float], told: bool) -> None:
        self.roles, self.low, self.high = facts.roles, *scale
        network = facts.roles["teacher"].host.network
        if scale[1] != 1 and getattr(getattr(network, "config", None), "guidance_embeds", False):
            warnings.warn(
                f"hasten: {type(network).__name__} hears its guidance as a number (data.call.guidance_scale), and method.scale ="
                f" {scale[1]:g} guides it once more, in two evaluations. Say method.scale=1 unless you want both.",
                stacklevel=2,
            )
        self.hint = Hint(facts.roles.of("student").host.network) if told else None

    def draw(self, draw: Draw) -> Tensor:
        """A scale for each row, uniform in the range."""
        return self.low + (self.high - self.low) * draw.uniform("scale")

    @torch.no_grad()
    def velocity(self, s: Tensor | float, x: Tensor, tau: Tensor, batch: Batch) -> Tensor:
        """F of the teacher at these scales."""
        fixed = self.low if self.low == self.high else s
        return Guided(self.roles["teacher"], batch.empty, fixed).velocity(x, tau, batch.condition)

    def student(self, s: Tensor | float | None = None, name: str = "student") -> Role | Hinted:
        """The student (or another role trained like it) for teachers guided by s; None: the middle of the range."""
        number = (self.low + self.high) / 2 if s is None else s
        return self.roles[name] if self.hint is None else Hinted(self.roles[name], self.hint, number)

    def heads(self, role: str) -> list[tuple[str, nn.Module]]:
        """The hint, which belongs to the student. A target hears through the same one: it is not averaged."""
        return [("scale", self.hint.module)] if role == "student" and self.hint is not None else []
