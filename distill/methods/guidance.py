"""Guidance distillation: one call of the student for two of the guided teacher.

Meng et al., On Distillation of Guided Diffusion Models, arXiv 2210.03142, section 3.1 (its first stage). They embed
w = s - 1 by an embedding of their own in a network trained whole; here s is told by a hint beside an adapter.

Shapes: B rows; x0 [B, ...]; tau float64 [B].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, Method, MethodState
from hasten.distill.network.guided_teacher import GuidedTeacher, Scale, check_told
from hasten.distill.network.hint import Hinted
from hasten.distill.network.paths import HALF_TURN, spread
from hasten.distill.network.roles import Role


class Guidance(Method):
    """The student's velocity shall be the guided teacher's, at every time and with the same number of steps.

    scale: guidance of the teacher, a number or a range. told: the student hears the scale, and one model serves the whole
    range. Times are even in the network's own, as samplers visit them.
    """

    kind: ClassVar[str] = "guidance"
    composable: ClassVar[bool] = True
    scale: Scale = Field((3.0, 3.0), validate_default=True)
    told: bool = False

    @model_validator(mode="after")
    def _hears_what_changes(self) -> Guidance:
        check_told(self.scale, self.told)
        return self

    def start(self, facts: Facts) -> MethodState:
        return _GuidanceState(self, facts)


class _GuidanceState(MethodState):
    def __init__(self, method: Guidance, facts: Facts) -> None:
        super().__init__(facts)
        self.teacher = GuidedTeacher(facts, method.scale, method.told)
        path = facts.roles["student"].host.path
        noise = torch.tensor([getattr(path, "end", HALF_TURN)], dtype=torch.float64)
        self.end = float(path.time(noise))

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None
        path = self.roles["student"].host.path
        tau = path.angle(draw.uniform("time") * self.end)
        z = draw.normal("noise", batch.x0)
        x = spread(tau.cos(), z) * batch.x0 + spread(tau.sin(), z) * z
        s = self.teacher.draw(draw)
        aim = self.teacher.velocity(s, x, tau, batch)
        made = self.teacher.student(s).velocity(x, tau, batch.condition)
        return Loss((made - aim).flatten(1).square().mean(1))

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return self.teacher.heads(role)

    def student(self) -> Role | Hinted:
        return self.teacher.student()
