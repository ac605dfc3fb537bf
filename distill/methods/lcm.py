"""Latent consistency: two neighbouring points of the guided teacher's trajectory shall have one end.

Luo et al., Latent Consistency Models, arXiv 2310.04378, algorithm 1; without a target: LCM-LoRA, arXiv 2311.05556. On
the circle the loss reads

    tau' : the next of `grid` angles below tau,   x' = cos(tau - tau') x - sin(tau - tau') F_teacher(x, tau; s)
    L = huber(f_student(x, tau) - f_target(x', tau')),    f(x, tau) = cos(tau) x - sin(tau) F(x, tau)

x' is one DDIM step of the teacher over k = 1000 / `grid` of its times. What differs from the paper: f(x, 0) = x holds by
the circle, where LCM forces it with c_skip and c_out of its own (by 0.5^2 / ((10 t)^2 + 0.5^2), which leaves the network
a task of another scale at every time, and is met at t = 0 alone); the lowest step ends at tau = 0, at the data
themselves, where diffusers' script stops at the first alpha_bar; s = 1 + w in the paper's terms.

Shapes: B rows; x0, x [B, ...]; tau, s float64 [B].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, Method, MethodState
from hasten.distill.methods.pairs import pseudo_huber
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.guided_teacher import GuidedTeacher, Scale, check_told
from hasten.distill.network.hint import Hinted
from hasten.distill.network.paths import spread, turned
from hasten.distill.network.roles import Role


class LCMLoRA(Method):
    """The student is its own target, without gradient, and hears nothing of the guidance scale (LCM-LoRA).

    scale: guidance of the teacher (the paper: w from 2 to 14, which is s from 3 to 15). grid: angles, evenly in the
    network's own time. calls: with how many the student is sampled. huber: c of the loss, 0 for squares. told: the
    student hears the scale; otherwise it learns the mean over the range.
    """

    kind: ClassVar[str] = "lcm-lora"
    composable: ClassVar[bool] = True
    scale: Scale = Field((3.0, 15.0), validate_default=True)
    told: bool = False
    grid: int = Field(50, ge=1)
    calls: int = Field(4, ge=1)
    huber: float = Field(1e-3, ge=0)

    @model_validator(mode="after")
    def _hears_what_changes(self) -> LCMLoRA:
        check_told(self.scale, self.told)
        return self

    def start(self, facts: Facts) -> MethodState:
        return _LCMState(self, facts, "student")


class LCM(LCMLoRA):
    """The target is an average of the student, and the student hears the scale (LCM).

    decay: of the average, each step.
    """

    kind: ClassVar[str] = "lcm"
    trains: ClassVar[tuple[str, ...]] = ("student", "target")
    averages: ClassVar[tuple[str, ...]] = ("target",)
    told: bool = True
    decay: float = Field(0.95, ge=0, lt=1)

    def start(self, facts: Facts) -> MethodState:
        return _LCMState(self, facts, "target", self.decay)


class _LCMState(MethodState):
    def __init__(self, method: LCMLoRA, facts: Facts, target: str, decay: float = 0.0) -> None:
        super().__init__(facts)
        self.method, self.target, self._decay = method, target, decay
        self.teacher = GuidedTeacher(facts, method.scale, method.told)
        path = facts.roles["student"].host.path
        self.steps = FewSteps.even(method.calls, path)
        self.angles = torch.tensor((*FewSteps.even(method.grid, path).angles, 0.0), dtype=torch.float64)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None
        number, angles = draw.below("step", self.method.grid), self.angles.to(batch.x0.device)
        tau, below = angles[number], angles[number + 1]
        z = draw.normal("noise", batch.x0)
        x = spread(tau.cos(), z) * batch.x0 + spread(tau.sin(), z) * z
        s = self.teacher.draw(draw)
        back = turned(x, self.teacher.velocity(s, x, tau, batch), tau - below)
        aim = self._end(back, below, s, batch)
        made = turned(x, self.teacher.student(s).velocity(x, tau, batch.condition), tau)
        return Loss(pseudo_huber(made - aim, self.method.huber))

    @torch.no_grad()
    def _end(self, x: Tensor, tau: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """The target's data from here. At tau = 0 that is x whatever the network says, were it not finite."""
        end = turned(x, self.teacher.student(s, self.target).velocity(x, tau, batch.condition), tau)
        return torch.where(spread(tau, x) == 0, x, end)

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return self.teacher.heads(role)

    def decay(self, role: str) -> float:
        return self._decay

    def student(self) -> Role | Hinted:
        return self.teacher.student()

    def sampler(self) -> FewSteps:
        return self.steps
