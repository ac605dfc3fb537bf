"""Fine-tuning of a network whose weights and activations have few bits, with adapters inside the rounding.

EfficientDM (He et al., arXiv 2310.03270): QALoRA (section 3.3), scale-aware optimisation (3.3), learned steps of activations
for each step of sampling (TALSQ, 3.4), all from the full-precision network's own trajectories, without data (3.2). The loss is
the paper's: the squared difference of what the two networks say, in their own terms, where the teacher comes by.

What differs: W itself is below the adapter, not its rounded value, as the teacher is there anyway; ranges belong to
bins of the network's time and are chosen by the time that it is told, not by counting calls; weights have a step for each
output channel that is calibrated by least squares; several steps of a trajectory make one batch.

Shapes: B rows of a batch, P points of each row's trajectory; x, answers [B, ...] in the network's own terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hasten.distill.loop import processes
from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Data, Facts, Loss, Method, MethodState
from hasten.distill.network.calibrate import look, ranges, steps_of
from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import HALF_TURN
from hasten.distill.network.quantised import LowRank, Quantised, TrainedLayer
from hasten.distill.network.walk import Walk, walk
from hasten.errors import RecipeError

EDGE_BITS = 8
"""Bits of the first and of the last layer, and of what they read, at least (section 4.1 of the paper)."""


class Rounding(Method):
    """Base of methods whose student is the teacher in few bits.

    weights, inputs: bits of weights and of what layers read. bins: of time, each with ranges of its own. steps: of the teacher's
    trajectories, guided by `scale`; points: steps of each at which the student is compared. samples: trajectories that
    ranges are calibrated on.

    matched: `answer`, what the network says; or `step`, where the teacher's step from there leads with it. For networks that
    predict noise the latter counts noisy times more, since their answers are divided by the signal.
    """

    trains: ClassVar[tuple[str, ...]] = ()
    data: ClassVar[Data] = "prompts"
    weights: int = Field(4, ge=2, le=8)
    inputs: int = Field(4, ge=2, le=8)
    bins: int = Field(10, ge=1)
    scale: float = Field(3.0, ge=0)
    steps: int = Field(20, ge=1)
    points: int = Field(10, ge=1)
    samples: int = Field(4, ge=1)
    matched: Literal["answer", "step"] = "answer"

    @model_validator(mode="after")
    def _within(self) -> Rounding:
        if self.points > self.steps:
            raise RecipeError(f"points must be at most steps, got points = {self.points} and steps = {self.steps}.")
        return self


class QALoRA(Rounding):
    """All layers are rounded, and each has an adapter of this rank inside the rounding."""

    kind: ClassVar[str] = "qalora"
    rank: int = Field(32, ge=1)

    def start(self, facts: Facts) -> MethodState:
        """Raises `RefusedError` for networks whose layers cannot be told the time."""
        return QALoRAState(self, facts)


@dataclass(frozen=True, slots=True)
class Points:
    """P points of each of B rows, P B rows, the first points of all rows first. x, tau, condition: where; aim: what the teacher
    says there; weight: of its squared error, float64."""

    x: Tensor
    tau: Tensor
    condition: Condition
    aim: Tensor
    weight: Tensor

    def off(self, made: Tensor, rows: int) -> Tensor:
        """How far `made` is from the aim, a mean over numbers and points: float32 [B]."""
        error = (made - self.aim).flatten(1).square().mean(1) * self.weight.to(made.device, made.dtype)
        return error.reshape(-1, rows).mean(0)


class RoundingState(MethodState):
    """The student, calibrated, and batches of the teacher's trajectories. `change` says what is trained of a layer."""

    def __init__(self, method: Rounding, facts: Facts) -> None:
        super().__init__(facts)
        self.method, self.teacher = method, facts.roles.of("teacher")
        network, path = self.teacher.host.network, self.teacher.host.path
        batch = facts.row(method.samples)
        self.sight = look(self.teacher, batch)
        self.end = float(path.time(torch.tensor([getattr(path, "end", HALF_TURN)], dtype=torch.float64)))
        device = next(network.parameters()).device
        z = Draw(0, 0, range(len(batch)), device).normal("calibration", torch.empty(len(batch), *batch.shape))
        range_of = ranges(self.teacher, batch, z.to(device), method.bins, self.end, method.steps, method.scale)
        layers = {}
        for name in self.sight.order:
            weight: Tensor = network.get_submodule(name).weight  # type: ignore[assignment]
            least = EDGE_BITS if name in self.sight.edges else 0
            bits, inputs = max(method.weights, least), max(method.inputs, least)
            s = steps_of(weight, bits)
            layers[name] = TrainedLayer(s, *range_of(name, inputs), bits, inputs, self.change(name, weight.float()))
        self.quantised = Quantised(self.teacher, layers, method.bins, self.end)
        processes.share([buffer for layer in layers.values() for buffer in layer.buffers()])

    def change(self, name: str, weight: Tensor) -> nn.Module | None:
        """What is added to a layer's weight before it is rounded."""
        raise NotImplementedError

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return self.quantised.layers.items() if role == "student" else ()

    def student(self) -> Quantised:
        return self.quantised

    def trajectory(self, batch: Batch, draw: Draw) -> Walk:
        """The teacher's, from noise of this step's own."""
        z = draw.normal("z", torch.empty(len(batch), *batch.shape, device=draw.device))
        return walk(self.teacher, z, batch, self.method.steps, self.method.scale)

    def points(self, way: Walk, batch: Batch, draw: Draw) -> Points:
        """Points of the trajectories, evenly apart; every other one is without prompt where the teacher is guided."""
        count, rows = self.method.points, torch.arange(len(batch), device=draw.device)
        apart = self.method.steps / count
        places = ((draw.uniform("point") + torch.arange(count, device=draw.device)[:, None]) * apart).long()
        taus = torch.tensor(way.taus, dtype=torch.float64, device=draw.device)
        weights = self.weights(taus) if self.method.matched == "step" else torch.ones_like(taus)
        tau, weight = taus[places].flatten(), weights[places].flatten()
        x, aim = (torch.stack(part)[places, rows].flatten(0, 1) for part in (way.x, way.c))
        condition = batch.condition.rows(rows.repeat(count))
        if way.u:
            bare = ((torch.arange(count, device=draw.device)[:, None] + draw.below("branch", 2)) % 2 == 1).flatten()
            condition = condition.where(bare, batch.empty.rows(torch.zeros(len(bare), dtype=torch.int64)))
            without = torch.stack(way.u)[places, rows].flatten(0, 1)
            aim = torch.where(bare.reshape(-1, *[1] * (aim.ndim - 1)), without, aim)
        return Points(x, tau, condition, aim, weight)

    def weights(self, taus: Tensor) -> Tensor:
        """(sin d q)^2 for steps of d radians, in units of their mean, [K]: x goes to cos d x - sin d (p x + q answer)."""
        d = taus - torch.cat([taus[1:], taus.new_zeros(1)])
        _, q = self.teacher.host.path.factors(taus)
        weight = (d.sin() * q).square()
        return weight / weight.mean()


class QALoRAState(RoundingState):
    """Matches the teacher's answers."""

    def change(self, name: str, weight: Tensor) -> nn.Module:
        assert isinstance(self.method, QALoRA)
        return LowRank(weight, self.method.rank)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        at = self.points(self.trajectory(batch, draw), batch, draw)
        return Loss(at.off(self.quantised.answer(at.x, at.tau, at.condition), len(batch)))
