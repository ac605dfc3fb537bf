"""Distribution matching between Gaussians: the exact gradient of KL, and what pulls a student that matches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts
from hasten.distill.methods.dmd import DMD
from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import Flow, NoisePath, VariancePreserving, spread
from hasten.distill.network.roles import Roles
from tests.distill import gaussians
from tests.distill.gaussians import WIDTH, Exact, Gaussian
from tests.distill.timed import TABLE

S, MU, EMPTY = 0.4, 0.5, -0.4
"""The data's deviation, its mean, and the mean of the empty prompt."""

PATHS: dict[str, NoisePath] = {"flow": Flow(), "v": VariancePreserving(TABLE, "v_prediction")}


class About(Exact):
    """Exact for N(mean, scale^2), whatever the prompt."""

    def __init__(self, scale: float, mean: float, path: NoisePath) -> None:
        super().__init__(Gaussian(scale), path)
        self.mean = mean

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        return super().forward(hidden_states, timestep, torch.full_like(hidden_states, self.mean))


class Affine(nn.Module):
    """A generator whose sample is a x + b."""

    def __init__(self, a: float, b: float, path: NoisePath) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, b))
        self.path = path

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        tau = self.path.angle(timestep)
        cos, sin, r, p, q = (
            spread(v, hidden_states) for v in (tau.cos(), tau.sin(), self.path.scale(tau), *self.path.factors(tau))
        )
        x = hidden_states / r
        return (((cos * x - self.a * x - self.b) / sin - p * x) / q,)


class Nodes(Draw):
    """Instead of chance, the 400 points of a quadrature over the sample's noise and that of its level; angles given."""

    share = 0.5

    def __init__(self) -> None:
        one, weight = np.polynomial.hermite_e.hermegauss(20)
        self.points = torch.cartesian_prod(*[torch.tensor(one)] * 2)
        self.weight = torch.cartesian_prod(*[torch.tensor(weight / math.sqrt(2 * math.pi))] * 2).prod(1)
        super().__init__(0, 0, range(len(self.points)))

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return self.points[:, [0 if purpose.endswith(".start") else 1]].expand(-1, WIDTH)

    def uniform(self, purpose: str) -> Tensor:
        return torch.full((len(self.points),), self.share, dtype=torch.float64)


def prompts(rows: int) -> Batch:
    def about(mean: float, rows: int) -> Condition:
        return Condition({"encoder_hidden_states": torch.full((rows, WIDTH), mean, dtype=torch.float64)})

    return Batch(about(MU, rows), about(EMPTY, 1), None, None, (WIDTH,))


def known(a: float, b: float, path: NoisePath, critic: tuple[float, float] | None = None, scale: float = 1.0) -> Any:
    """The state of a training whose student makes a z + b of pure noise z, and whose critic is exact for that."""
    roles = Roles(teacher=gaussians.role("teacher", Exact(Gaussian(S), path).requires_grad_(False), path))
    roles["student"] = gaussians.role("student", Affine(a, b, path), path)
    roles["critic"] = gaussians.role("critic", About(*(critic or (a, b)), path), path)
    return DMD(scale=scale).start(Facts(roles, 10, (WIDTH,)))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_gap_is_the_gradient_of_the_divergence(path: NoisePath, scale: float, share: float) -> None:
    """(x0_critic - x0_teacher) by the student's weights is tan^2 times the gradient of KL, in closed form."""
    a, b, draw = 0.7, 0.1, Nodes()
    state, batch = known(a, b, path, scale=scale), prompts(len(draw.points))
    made = state.rollout.made(batch, draw, "student", 0, graph=True)
    tau = torch.full((len(batch),), share, dtype=torch.float64)
    fake, real = state.seen(made.detach(), tau, draw.normal("level", made), 0, batch)
    ((made * (fake - real)).mean(1) * draw.weight).sum().backward()
    student = state.roles["student"].host.network
    # What the sampler starts from is nearly pure noise: x = cos z + sin z of the table's end is scaled by 1 anyway.
    c, n, mean = math.cos(share), math.sin(share), EMPTY + scale * (MU - EMPTY)
    real_square, fake_square = (c * S) ** 2 + n**2, (c * a) ** 2 + n**2
    by_a = c**2 * a * (1 / real_square - 1 / fake_square)
    by_b = c**2 * (b - mean) / real_square
    torch.testing.assert_close(float(student.a.grad), (n / c) ** 2 * by_a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(float(student.b.grad), (n / c) ** 2 * by_b, rtol=1e-9, atol=1e-12)


def test_nothing_pulls_a_student_that_matches_and_only_that_one() -> None:
    draw = Nodes()
    batch = prompts(len(draw.points))
    rows = {law: known(*law, Flow()).loss("student", batch, draw, 0, {}).rows for law in ((S, MU), (0.5, MU), (S, 0.6))}
    assert float(rows[S, MU].max()) < 1e-20
    assert all(float(rows[law].mean()) > 1e-4 for law in ((0.5, MU), (S, 0.6)))


def test_the_loss_divides_by_the_distance_to_the_teachers_data_row_by_row() -> None:
    draw = Nodes()
    state, batch = known(0.7, 0.1, Flow()), prompts(len(draw.points))
    loss = state.loss("student", batch, draw, 0, {})
    made = loss.keep["dmd.made"]
    tau, z = state._level("student", made, draw)
    fake, real = state.seen(made, tau, z, 0, batch)
    g = (fake - real) / (made - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(loss.rows, g.square().mean(1) / 2)
    loss.rows.sum().backward()
    torch.testing.assert_close(state.roles["student"].host.network.b.grad, g.mean(1).sum())
    assert float(loss.metrics["gap"]) == pytest.approx(float((fake - real).square().mean(1).sqrt().mean()))


def test_the_critics_loss_is_least_for_the_law_of_the_samples() -> None:
    draw = Nodes()
    batch = prompts(len(draw.points))
    slope = {}
    for law in ((0.7, 0.1), (0.7, 0.2)):
        state = known(0.7, 0.1, Flow(), critic=law)
        (state.loss("critic", batch, draw, 0, {}).rows * draw.weight).sum().backward()
        slope[law] = float(state.roles["critic"].host.network.off.grad.abs().max())
    assert slope[0.7, 0.1] < 1e-12 and slope[0.7, 0.2] > 1e-2
