"""Continuous-time consistency: along the guided teacher's trajectory the student's end must not move at all.

Lu and Song, Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, arXiv 2410.11081, section 4 and
algorithm 1, for any teacher as in SANA-Sprint (arXiv 2503.09641, section 3). With F- the student without gradient, v the
teacher's velocity and dF- the change of F- along (v, 1), which is along the trajectory,

    g = -cos^2 (F- - v) - r cos sin (x + dF-),    r = min(1, step / warmup),    g <- g / (|g| + 0.1)
    L = exp(-l(tau)) / tan(tau) |F - F- - g|^2 + l(tau)

What differs from the paper: |g| is the root of the *mean* square, so that 0.1 means the same at every resolution (as in
SANA-Sprint's code); the unit of data is 1, so that 1 / (sd tan) is 1 / tan, and log-normal means are larger by
-log(0.5) = 0.69 than those written for sd = 0.5; l is a small module of its own, not a head on the network's time
embedding, which belongs to the frozen base.

Shapes: B rows; x0, x, F, g [B, ...]; tau, s float64 [B].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hasten.distill.loop.direction import TURN, Sketch
from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, Method, MethodState
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.guided_teacher import GuidedTeacher, Scale, check_told
from hasten.distill.network.hint import Hinted, NumberEmbedding
from hasten.distill.network.jvp import How, tangent
from hasten.distill.network.paths import HALF_TURN, spread
from hasten.distill.network.roles import Role

TOP = math.atan(160.0)
"""The largest angle that is trained (the paper's sigma of 80 at sd = 0.5). At pi / 2 itself g and 1 / tan vanish: nothing
would be learned there."""


class SCM(Method):
    """Consistency without a grid: the tangent is exact, so that there is no step size to be wrong.

    scale, told: guidance of the teacher, and whether the student hears it. mean, spread: of log tan(tau). top: share of
    the rows at the largest angle, where a one-step student is asked. warmup: steps over which the unstable part of the
    tangent is let in. adaptive: l(tau) is learned; otherwise 0. tangent: `exact`, or the radians of a difference: for a
    teacher that was never made smooth in time take 0.05 (`jvp.How` says why). calls: with how many the student is sampled.
    """

    kind: ClassVar[str] = "scm"
    composable: ClassVar[bool] = True
    scale: Scale = Field((4.5, 4.5), validate_default=True)
    told: bool = False
    mean: float = 0.9
    spread: float = Field(1.6, gt=0)
    top: float = Field(0.0, ge=0, le=1)
    warmup: int = Field(1000, ge=0)
    adaptive: bool = True
    tangent: How = "exact"
    calls: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _hears_what_changes(self) -> SCM:
        check_told(self.scale, self.told)
        return self

    def start(self, facts: Facts) -> MethodState:
        return SCMState(self, facts)


class SCMState(MethodState):
    """Losses of continuous-time consistency; open to methods that add to them."""

    def __init__(self, method: SCM, facts: Facts) -> None:
        super().__init__(facts)
        self.method = method
        self.teacher = GuidedTeacher(facts, method.scale, method.told)
        path = facts.roles["student"].host.path
        self.end = getattr(path, "end", HALF_TURN)
        self.top = min(TOP, path.start)
        self.steps = FewSteps.even(method.calls, path)
        device = next(facts.roles["student"].host.network.parameters()).device
        self.sketch = Sketch(facts.shape, device)
        self.weighting = NumberEmbedding(1).to(device) if method.adaptive else None

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None
        tau, z = self._angles(draw).to(batch.x0.device), draw.normal("noise", batch.x0)
        x = spread(tau.cos(), z) * batch.x0 + spread(tau.sin(), z) * z
        s = self.teacher.draw(draw)
        student = self.teacher.student(s)
        v = self.teacher.velocity(s, x, tau, batch)
        one, how = torch.ones_like(tau), self.method.tangent
        old, slope = tangent(student, x, tau, batch.condition, v, one, how, self.end)
        g = residual(x, tau, v, old, slope, min(1.0, (step + 1) / max(1, self.method.warmup)))
        size = g.flatten(1).square().mean(1).sqrt()
        g = g / (spread(size, g) + 0.1)
        made = student.velocity(x, tau, batch.condition)
        # Not `made - old`: the tangent's pass rounds otherwise than this one, and that difference is no error.
        rows = (made - (made.detach() + g)).flatten(1).square().mean(1) / tau.tan().to(made.dtype)
        metrics = {"tangent": size.mean(), "along_data": _cosine(g, x).mean(), TURN: self.sketch(g)}
        if self.weighting is None:
            return Loss(rows, metrics)
        level = self.weighting(tau.tan().log())[:, 0].to(rows.dtype)
        return Loss(rows * (-level).exp() + level, metrics)

    def _angles(self, draw: Draw) -> Tensor:
        usual = (self.method.mean + self.method.spread * draw.gaussian("time")).exp().atan().clamp(max=self.top)
        return torch.where(draw.uniform("top") < self.method.top, self.top, usual)

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        weighting = [("weighting", self.weighting)] if role == "student" and self.weighting is not None else []
        return [*self.teacher.heads(role), *weighting]

    def student(self) -> Role | Hinted:
        return self.teacher.student()

    def sampler(self) -> FewSteps:
        return self.steps


def residual(x: Tensor, tau: Tensor, v: Tensor, old: Tensor, slope: Tensor, r: float) -> Tensor:
    """g before normalisation [B, ...]: at r = 1, cos(tau) times how the student's end moves along the teacher's trajectory.

    slope: of `old` along (v, 1).
    """
    square, both = spread(tau.cos().square(), x), spread(tau.cos() * tau.sin(), x)
    return -square * (old - v) - r * both * (x + slope)


def _cosine(g: Tensor, x: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(g.flatten(1), x.flatten(1), dim=1).detach()
