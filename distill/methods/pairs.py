"""Distillation on stored pairs: noise in, the teacher's finished sample out, in one call.

The plainest way there is, and the control that every other one has to beat (as in Luhman and Luhman, arXiv 2101.02388;
FastGen calls it knowledge distillation).

Shapes: B rows; x0, z [B, ...].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.distill.draw import Draw
from hasten.distill.few_steps import FewSteps
from hasten.distill.method import Batch, Data, Facts, Loss, Method, MethodState
from hasten.distill.paths import spread


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """sqrt(|e|^2 + c^2 d) - c sqrt(d) over the d numbers of each row (arXiv 2310.14189, section 3.3), divided by d;
    c = 0: the mean square. float32 [B]."""
    flat = error.flatten(1)
    square = flat.square().mean(1)
    return square if c == 0 else (square + c * c).sqrt() - c


class Pairs(Method):
    """The student's x0 at pure noise shall be what the teacher made of that noise.

    calls: with more than one, the student is asked at as many angles, on the straight way between noise and result on
    the circle, and is sampled deterministically. huber: c of the pseudo-Huber loss, 0 for squares.
    """

    kind: ClassVar[str] = "pairs"
    data: ClassVar[Data] = "pairs"
    calls: int = Field(1, ge=1)
    huber: float = Field(0.0, ge=0)

    def start(self, facts: Facts) -> MethodState:
        return _PairsState(self, facts)


class _PairsState(MethodState):
    def __init__(self, method: Pairs, facts: Facts) -> None:
        super().__init__(facts)
        self.method = method
        path = facts.roles["student"].host.path
        self.steps = FewSteps.even(method.calls, path, "ode")
        self.angles = torch.tensor(self.steps.angles, dtype=torch.float64)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None and batch.z is not None
        first = self.angles[0]
        # The student starts with z itself, whatever angle it is told: this is the noise it then sees in it.
        x0, z = batch.x0, (batch.z - float(first.cos()) * batch.x0) / float(first.sin())
        tau = self.angles.to(x0.device)[draw.below("call", len(self.angles))]
        x = spread(tau.cos(), x0) * x0 + spread(tau.sin(), x0) * z
        made = self.roles["student"].data(x, tau, batch.condition)
        return Loss(pseudo_huber(made - x0, self.method.huber))

    def sampler(self) -> FewSteps:
        return self.steps
