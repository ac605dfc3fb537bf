"""Distillation on stored pairs: noise in, the teacher's finished sample out, in one call.

The plainest way there is, and the control that every other one has to beat (as in Luhman and Luhman, arXiv 2101.02388;
FastGen calls it knowledge distillation).

Shapes: B rows; x0, z [B, ...].
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Data, Facts, Loss, Method, MethodState
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.paths import spread, turned
from hasten.errors import RecipeError


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """sqrt(|e|^2 + c^2 d) - c sqrt(d) over the d numbers of each row (arXiv 2310.14189, section 3.3), divided by d;
    c = 0: the mean square. float32 [B]."""
    flat = error.flatten(1)
    square = flat.square().mean(1)
    return square if c == 0 else (square + c * c).sqrt() - c


class Pairs(Method):
    """The student's x0 at pure noise shall be what the teacher made of that noise.

    calls: with more than one, the student is asked at as many angles, and is sampled deterministically. own: it is asked
    where its own earlier calls have led it, as it will be when it is used; otherwise on the straight way between noise
    and result on the circle, where nothing that it does wrong is seen. way: the teacher's own points at those angles are
    kept with the pairs, and each call shall reach the next of them instead of the result at once: from the teacher's last
    point, or (`own`) from where the student is. huber: c of the pseudo-Huber loss, 0 for squares.
    """

    kind: ClassVar[str] = "pairs"
    data: ClassVar[Data] = "pairs"
    calls: int = Field(1, ge=1)
    own: bool = False
    way: bool = False
    huber: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _has_points(self) -> Pairs:
        if self.way and self.calls == 1:
            raise RecipeError("way asks for the teacher's points between several calls, and calls is 1: the result is all there is.")
        return self

    @property
    def way_points(self) -> int:
        return self.calls if self.way else 0

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
        assert batch.x0 is not None
        if not self.method.way:
            x, tau = self._walked(batch, draw)[:2] if self.method.own else self._straight(batch, draw)
            made = self.roles["student"].data(x, tau, batch.condition)
            return Loss(pseudo_huber(made - batch.x0, self.method.huber))
        x, tau, call = self._walked(batch, draw) if self.method.own else self._on_way(batch, draw)
        ends = torch.cat([self.angles[1:], self.angles.new_zeros(1)]).to(tau.device)
        made = turned(x, self.roles["student"].velocity(x, tau, batch.condition), tau - ends[call])
        return Loss(pseudo_huber(made - _row_of(_stops(batch)[:, 1:], call), self.method.huber))

    def _straight(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """(x, tau) on the way from each row's noise to its result, at a call of its own."""
        assert batch.x0 is not None and batch.z is not None
        first = self.angles[0]
        # The student starts with z itself, whatever angle it is told: this is the noise it then sees in it.
        z = (batch.z - float(first.cos()) * batch.x0) / float(first.sin())
        tau = self.angles.to(z.device)[draw.below("call", len(self.angles))]
        return spread(tau.cos(), z) * batch.x0 + spread(tau.sin(), z) * z, tau

    def _on_way(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """(x, tau, call) where the teacher was, at a call of each row's own."""
        call = draw.below("call", len(self.angles))
        return _row_of(_stops(batch), call), self.angles.to(call.device)[call], call

    @torch.no_grad()
    def _walked(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """(x, tau, call) where the student's own calls have led, before a call that is drawn for the whole batch."""
        assert batch.z is not None
        x = batch.z
        angles = [torch.full((len(x),), angle, dtype=torch.float64, device=x.device) for angle in self.steps.angles]
        call = draw.one_below("call", len(angles))
        for tau, after in pairwise(angles[: call + 1]):
            x = turned(x, self.roles["student"].velocity(x, tau, batch.condition), tau - after)
        return x, angles[call], torch.full((len(x),), call, device=x.device)

    def sampler(self) -> FewSteps:
        return self.steps


def _stops(batch: Batch) -> Tensor:
    """[B, K + 1, ...]: the noise, the teacher's points, its result."""
    assert batch.x0 is not None and batch.z is not None and batch.way is not None
    return torch.cat([batch.z[:, None], batch.way, batch.x0[:, None]], 1)


def _row_of(stops: Tensor, call: Tensor) -> Tensor:
    """[B, ...]: the stop of each row's call."""
    return stops[torch.arange(len(stops), device=stops.device), call]
