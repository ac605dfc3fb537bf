"""Progressive distillation: one step of the student for two of its teacher; then the student is the teacher.

Salimans and Ho, arXiv 2202.00512, algorithm 2, with DDIM steps, which on the circle are rotations. The velocity that
leads in one step where two steps lead, x -> x'', is

    U = (cos(tau - tau'') x - x'') / sin(tau - tau'')

and |F - U|^2 is the paper's "SNR + 1" weighting of squared errors of the data (section 4), as x0 = cos x - sin F. What
differs: a guided teacher is distilled along with the first halving (Meng et al., arXiv 2210.03142, take a training of its
own for it); all halvings are one training, so that the rate falls once, at the end, and not in each; with adapters the
first teacher is the student's own base with the adapter off.

Shapes: B rows; x0, x [B, ...]; tau float64 [B].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, Method, MethodState
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.guided_teacher import GuidedTeacher, Scale
from hasten.distill.network.paths import spread, turned
from hasten.errors import RecipeError


class Progressive(Method):
    """Halves the number of steps, from 2 `first` of the teacher to `calls` of the student, in stages of equal length.

    scale: guidance of the teacher, one number. first: steps of the student in the first stage, `calls` times a power of
    two. The role `before` is what the student was at the end of the last stage.
    """

    kind: ClassVar[str] = "progressive"
    composable: ClassVar[bool] = True
    trains: ClassVar[tuple[str, ...]] = ("student", "before")
    averages: ClassVar[tuple[str, ...]] = ("before",)
    scale: Scale = Field((3.0, 3.0), validate_default=True)
    first: int = Field(16, ge=1)
    calls: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _halving(self) -> Progressive:
        count = self.first
        while count > self.calls and count % 2 == 0:
            count //= 2
        if count != self.calls:
            raise RecipeError(f"first must be calls x 2, 4, 8, ..., got first = {self.first} and calls = {self.calls}.")
        if self.scale[0] != self.scale[1]:
            raise RecipeError(f"progressive distils one guidance scale, got {self.scale}. For a range: method guidance.")
        return self

    def start(self, facts: Facts) -> MethodState:
        return _ProgressiveState(self, facts)


class _ProgressiveState(MethodState):
    def __init__(self, method: Progressive, facts: Facts) -> None:
        super().__init__(facts)
        self.method = method
        self.teacher = GuidedTeacher(facts, method.scale, told=False)
        self.counts = [method.first]
        while self.counts[-1] > method.calls:
            self.counts.append(self.counts[-1] // 2)
        self.now = 0

    def stage(self, step: int) -> int:
        """Which halving a step belongs to."""
        return min(step * len(self.counts) // self.facts.steps, len(self.counts) - 1)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None
        self.now = step
        count = self.counts[self.stage(step)]
        angles = torch.tensor((*self._steps(2 * count).angles, 0.0), dtype=torch.float64, device=batch.x0.device)
        number = 2 * draw.below("step", count)
        tau, middle, below = (angles[number + k] for k in range(3))
        z = draw.normal("noise", batch.x0)
        x = spread(tau.cos(), z) * batch.x0 + spread(tau.sin(), z) * z
        half = turned(x, self._before(x, tau, step, batch), tau - middle)
        there = turned(half, self._before(half, middle, step, batch), middle - below)
        aim = chord(x, there, tau - below)
        made = self.roles["student"].velocity(x, tau, batch.condition)
        return Loss((made - aim).flatten(1).square().mean(1), {"calls": torch.tensor(float(count))})

    @torch.no_grad()
    def _before(self, x: Tensor, tau: Tensor, step: int, batch: Batch) -> Tensor:
        """F of this stage's teacher: the guided one first, then what the student was."""
        if self.stage(step) == 0:
            return self.teacher.velocity(self.method.scale[0], x, tau, batch)
        return self.roles["before"].velocity(x, tau, batch.condition)

    def _steps(self, count: int) -> FewSteps:
        return FewSteps.even(count, self.roles["student"].host.path, "ode")

    def decay(self, role: str) -> float:
        """0 at the end of a stage, where the student becomes its own teacher; 1 within."""
        return 0.0 if self.stage(self.now + 1) != self.stage(self.now) else 1.0

    def sampler(self) -> FewSteps:
        return self._steps(self.method.calls)


def chord(x: Tensor, there: Tensor, angle: Tensor) -> Tensor:
    """The velocity with `turned(x, velocity, angle) == there`."""
    return (spread(angle.cos(), x) * x - there) / spread(angle.sin(), x)
