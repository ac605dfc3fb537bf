"""Flow maps: a network that is told how far it goes, and leads there in one call.

MeanFlow (Geng et al., arXiv 2505.13447, sections 4.1 and 4.2): the average velocity u(x, t, r) = (x_t - x_r) / (t - r)
of flow matching is the one function with

    u = v - (t - r) du/dt      (d/dt along the trajectory, r fixed)

and the student learns it by its own exact tangent; here v is the guided teacher's velocity, not z - x0.

On the circle a flow map is `turned(x, U, tau - rho)`, a rotation in the plane of x and U (`FlowMap.toward`). With
t = sin / (sin + cos) of tau and r that of rho, U and u are the same thing: U = (alpha - sigma) x + sqrt(alpha^2 + sigma^2) u
with alpha = 1 - t, sigma = t, whatever rho is. So a flow-matching network *answers* MeanFlow's u, one of another kind answers
what takes its place, and the student starts as the teacher's DDIM step over any distance. The identity is used in flow
time for all of them, as there it is bounded everywhere (on the circle it reads U = v - tan(tau - rho) (x + dU/dtau)).

How r is told without a change of the architecture: an embedding of tau - rho that starts at zero is added to the
network's time embedding (`hint.py`).

Shapes: B rows; x0, x, u, U, v [B, ...]; tau, rho, t, r, s float64 [B].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.distill.loop.direction import TURN, Sketch
from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, Method, MethodState
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.guided_teacher import GuidedTeacher, Scale
from hasten.distill.network.hint import FlowMap, Hint
from hasten.distill.network.jvp import How, along
from hasten.distill.network.paths import HALF_TURN, Flow, spread

CIRCLE = Flow(1.0)
"""Changes between the circle and flow time."""


class MeanFlow(Method):
    """The student leads from any time to any earlier one.

    scale: guidance of the teacher. mean, spread: t and r are sigmoids of a normal. instant: share of rows with r = t,
    where the student learns the teacher's velocity itself. whole: share of rows that go from noise to data at once.
    power: rows are weighted by (mean square + 1e-3)^-power (the paper sums squares instead: there 1e-3 is a smaller
    share). tangent: `exact`, or the radians of a difference: for a teacher that was never made smooth in time take 0.05
    (`jvp.How` says why; with tiny-flux the exact one diverges). calls: with how many the student is sampled.
    """

    kind: ClassVar[str] = "meanflow"
    composable: ClassVar[bool] = True
    scale: Scale = Field((3.0, 3.0), validate_default=True)
    mean: float = -0.4
    spread: float = Field(1.0, gt=0)
    instant: float = Field(0.75, ge=0, le=1)
    whole: float = Field(0.0, ge=0, le=1)
    power: float = Field(1.0, ge=0)
    tangent: How = "exact"
    calls: int = Field(1, ge=1)

    def start(self, facts: Facts) -> MethodState:
        return _MeanFlowState(self, facts)


class _MeanFlowState(MethodState):
    def __init__(self, method: MeanFlow, facts: Facts) -> None:
        super().__init__(facts)
        self.method = method
        student = facts.roles["student"]
        self.teacher = GuidedTeacher(facts, method.scale, told=False)
        self.hint = Hint(student.host.network)
        self.map = FlowMap(student, self.hint)
        self.end = getattr(student.host.path, "end", HALF_TURN)
        self.steps = FewSteps.even(method.calls, student.host.path, "map")
        self.sketch = Sketch(facts.shape, next(student.host.network.parameters()).device)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None
        tau, rho = (CIRCLE.angle(time).clamp(max=self.end).to(batch.x0.device) for time in self._times(draw))
        z = draw.normal("noise", batch.x0)
        x = spread(tau.cos(), z) * batch.x0 + spread(tau.sin(), z) * z
        velocity = self.teacher.velocity(self.teacher.draw(draw), x, tau, batch)

        def average(x: Tensor, tau: Tensor) -> Tensor:
            return in_flow_time(self.map.toward(x, tau, rho, batch.condition), x, tau)

        with self.roles["student"].playing():
            _, change = along(average, x, tau, velocity, torch.ones_like(tau), self.method.tangent, self.end)
        # The change above is with tau, of which a unit of t is (sin + cos)^2.
        change = spread((tau.sin() + tau.cos()).square(), x) * change
        moved = spread(CIRCLE.time(tau) - CIRCLE.time(rho), x) * change
        aim = in_flow_time(velocity, x, tau) - moved
        square = (average(x, tau) - aim).flatten(1).square().mean(1)
        weight = (square.detach() + 1e-3) ** -self.method.power
        # Rows that go nowhere learn nothing of their tangent, and do not count in its direction.
        metrics = {"error": square.detach().mean(), "change": _size(change).mean(), TURN: self.sketch(moved)}
        return Loss(weight * square, metrics)

    def _times(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """(t, r) with t >= r, float64 [B]."""
        m = self.method
        drawn = [(m.mean + m.spread * draw.gaussian(f"time.{k}")).sigmoid() for k in (0, 1)]
        t, r = torch.maximum(*drawn), torch.minimum(*drawn)
        r = torch.where(draw.uniform("instant") < m.instant, t, r)
        whole = draw.uniform("whole") < m.whole
        return t.masked_fill(whole, 1.0), r.masked_fill(whole, 0.0)

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [("distance", self.hint.module)] if role == "student" else []

    def student(self) -> FlowMap:
        return self.map

    def sampler(self) -> FewSteps:
        return self.steps


def in_flow_time(velocity: Tensor, x: Tensor, tau: Tensor) -> Tensor:
    """u of flow matching that U = `velocity` [B, ...] on the circle stands for."""
    p, q = (spread(factor, x) for factor in CIRCLE.factors(tau))
    return (velocity - p * x) / q


def _size(value: Tensor) -> Tensor:
    return value.flatten(1).square().mean(1).sqrt()
