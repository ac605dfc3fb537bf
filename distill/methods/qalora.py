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
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hasten.distill import processes
from hasten.distill.calibrate import look, ranges, steps_of
from hasten.distill.draw import Draw
from hasten.distill.host_call import Condition
from hasten.distill.method import Batch, Data, Facts, Loss, Method, MethodState
from hasten.distill.paths import HALF_TURN
from hasten.distill.quantised import LowRank, Quantised, TrainedLayer
from hasten.distill.walk import Walk, walk
from hasten.errors import RecipeError

EDGE_BITS = 8
"""Bits of the first and of the last layer, and of what they read, at least (section 4.1 of the paper)."""


class Rounding(Method):
    """Base of methods whose student is the teacher in few bits.

    weights, inputs: bits of weights and of what layers read. bins: of time, each with ranges of its own. steps: of the teacher's
    trajectories, guided by `scale`; points: steps of each at which the student is compared. samples: trajectories that
    ranges are calibrated on.
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

    def points(self, way: Walk, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Condition, Tensor]:
        """(x, tau, condition, the teacher's answer) at P points of each row, evenly apart, P B rows of them, the first
        points of all rows first; every other one is without prompt where the teacher is guided."""
        count, rows = self.method.points, torch.arange(len(batch), device=draw.device)
        apart = self.method.steps / count
        places = ((draw.uniform("point") + torch.arange(count, device=draw.device)[:, None]) * apart).long()
        tau = torch.tensor(way.taus, dtype=torch.float64, device=draw.device)[places].flatten()
        x, aim = (torch.stack(part)[places, rows].flatten(0, 1) for part in (way.x, way.c))
        condition = batch.condition.rows(rows.repeat(count))
        if way.u:
            bare = ((torch.arange(count, device=draw.device)[:, None] + draw.below("branch", 2)) % 2 == 1).flatten()
            condition = condition.where(bare, batch.empty.rows(torch.zeros(len(bare), dtype=torch.int64)))
            without = torch.stack(way.u)[places, rows].flatten(0, 1)
            aim = torch.where(bare.reshape(-1, *[1] * (aim.ndim - 1)), without, aim)
        return x, tau, condition, aim


class QALoRAState(RoundingState):
    """Matches the teacher's answers."""

    def change(self, name: str, weight: Tensor) -> nn.Module:
        assert isinstance(self.method, QALoRA)
        return LowRank(weight, self.method.rank)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        x, tau, condition, aim = self.points(self.trajectory(batch, draw), batch, draw)
        made = self.quantised.answer(x, tau, condition)
        off = (made - aim).flatten(1).square().mean(1)
        return Loss(off.reshape(self.method.points, len(batch)).mean(0))
