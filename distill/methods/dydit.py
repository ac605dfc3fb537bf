"""Dynamic width and tokens: the student learns, together with its routers, what need not run at which time.

Zhao et al., Dynamic Diffusion Transformer, arXiv 2410.03456, section 3.3 (DyDiT++, arXiv 2504.06803, for flow matching):

    L = |y_routed - y|^2 + |y_full - y|^2 + weight (E_t W(t) - target)^2

with W(t) the share of the multiply-adds that runs at t, Gumbel noise on the logits of the gates, gradients straight
through, and a target that falls from 1. Gates: `caching/routers.py`, which says what differs there.

What differs here: y is the teacher's own answer, not the noise of the data. The paper drops the second term after a
warm-up; it stays, so that the adapter without its routers is a student, too. E_t W is the mean over a grid of times rather
than over the batch: exact, and no row depends on its neighbours.

Shapes: B rows; x0, x, y [B, ...]; tau, u float64 [B].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.caching.routed import RoutedReuse
from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Beside, Facts, Loss, Method, MethodState
from hasten.distill.network.paths import HALF_TURN, NoisePath, spread
from hasten.distill.network.routed import Routed, routers_of
from hasten.errors import UsageError

GRID = 64
"""Times over which the work is averaged."""

FILE = "routers.safetensors"


class DyDiT(Method):
    """The student is sampled as its teacher is, with the same solver, steps and guidance, and does less in each.

    target: share of the multiply-adds that shall run, on average over the times. weight: of the distance from it. anneal:
    share of the training over which the target falls from 1. groups: gates of a feed-forward module. tokens: whether tokens
    are routed, too. empty: share of rows without prompt, for the second branch of guidance.
    """

    kind: ClassVar[str] = "dydit"
    target: float = Field(0.7, gt=0, le=1)
    weight: float = Field(2.0, gt=0)
    anneal: float = Field(0.5, ge=0, le=1)
    groups: int = Field(8, ge=2)
    tokens: bool = True
    empty: float = Field(0.3, ge=0, le=1)

    def start(self, facts: Facts) -> MethodState:
        return _DyDiTState(self, facts)


class _DyDiTState(MethodState):
    def __init__(self, method: DyDiT, facts: Facts) -> None:
        super().__init__(facts)
        self.method = method
        role, row = facts.roles["student"], facts.row()
        assert row.x0 is not None
        middle = torch.full((1,), HALF_TURN / 2, dtype=torch.float64)
        self.routers, sites = routers_of(role, row.x0, middle, row.condition, method.groups, method.tokens)
        if self.routers.floor() > method.target:
            raise UsageError(
                f"With everything shut that can be, {self.routers.floor():.2f} of {type(role.host.network).__name__}'s work still"
                f" runs; method.target = {method.target:g} cannot be reached. Ask for more."
            )
        self.routed = Routed(role, self.routers, sites)
        self.end = _end(role.host.path)
        self.grid = torch.arange(0.5, GRID) / GRID

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None
        path = self.roles["student"].host.path
        u = draw.uniform("time") * self.end
        tau = path.angle(u * _unit(path))
        z = draw.normal("noise", batch.x0)
        x = spread(tau.cos(), z) * batch.x0 + spread(tau.sin(), z) * z
        none = batch.empty.rows(torch.zeros(len(x), dtype=torch.int64))
        condition = batch.condition.where(draw.uniform("empty") < self.method.empty, none)
        with torch.no_grad():
            y = self.roles["teacher"].answer(x, tau, condition)
        gates = self.routers(u, _logistic(draw.normal("gates", x.new_empty(len(x), self.routers.numbers))))
        full = _square(self.roles["student"].answer(x, tau, condition) - y)
        routed = _square(self.routed.answer(x, tau, condition, gates) - y)
        work = self.routers.work(self.routers(self.grid)).mean()
        aim = self.target(step)
        metrics = {"work": work.detach(), "routed": routed.mean().detach(), "full": full.mean().detach()}
        return Loss(routed + full + self.method.weight * (work - aim).square(), metrics)

    def target(self, step: int) -> float:
        """Share of the work that is asked for at a step."""
        gone = min(1.0, (step + 1) / max(1.0, self.method.anneal * self.facts.steps))
        return 1 - (1 - self.method.target) * gone

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [("routers", self.routers)] if role == "student" else []

    def beside(self, weights: Mapping[str, Tensor]) -> Beside:
        """The routers as a file, and the part of a recipe that uses it."""
        own = {name.removeprefix("heads.routers."): w for name, w in weights.items() if name.startswith("heads.routers.")}
        before = {name: value.clone() for name, value in self.routers.state_dict().items()}
        self.routers.load_state_dict(own)
        made = Beside(FILE, self.routers.packed(), RoutedReuse(path=FILE))
        self.routers.load_state_dict(before)
        return made


def _unit(path: NoisePath) -> float:
    """What the network is told at the last time there can be."""
    return float(getattr(path, "unit", 1000.0))


def _end(path: NoisePath) -> float:
    """The time of pure noise, over `_unit`."""
    noise = torch.tensor([getattr(path, "end", HALF_TURN)], dtype=torch.float64)
    return float(path.time(noise)) / _unit(path)


def _logistic(normal: Tensor) -> Tensor:
    """Standard normal numbers as logistic ones, which is what the difference of two Gumbel numbers is."""
    below: Tensor = torch.special.ndtr(normal.double())
    return below.clamp(1e-6, 1 - 1e-6).logit().float()


def _square(error: Tensor) -> Tensor:
    rows: Tensor = error.flatten(1).square().mean(1)
    return rows
