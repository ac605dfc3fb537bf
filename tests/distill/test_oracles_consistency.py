"""Consistency methods against closed forms in float64: exact networks have nothing left to learn, wrong ones have."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from hasten.distill.loop.draw import Draw
from hasten.distill.methods.lcm import LCM, LCMLoRA
from hasten.distill.methods.scm import SCM, residual
from hasten.distill.network.jvp import tangent
from hasten.distill.network.paths import Flow, NoisePath, guided, spread, turned
from hasten.distill.network.roles import Guided
from tests.distill import gaussians
from tests.distill.gaussians import Gaussian, Law, Mixture, batch, roles
from tests.distill.oracles import Halfway, each_law, each_path, facts, points, rows_of

# --- the exact networks are exact --------------------------------------------------------------------


@each_law
def test_velocities_carry_points_where_the_map_says(law: Law) -> None:
    """Runge and Kutta's steps along the velocity end where quantiles do."""
    x, tau, mean = points()
    rho = tau * 0.3
    h, at, now = (rho - tau) / 200, x, tau
    for _ in range(200):
        k1 = law.velocity(at, now, mean)
        k2 = law.velocity(at + spread(h / 2, x) * k1, now + h / 2, mean)
        k3 = law.velocity(at + spread(h / 2, x) * k2, now + h / 2, mean)
        k4 = law.velocity(at + spread(h, x) * k3, now + h, mean)
        at, now = at + spread(h / 6, x) * (k1 + 2 * k2 + 2 * k3 + k4), now + h
    torch.testing.assert_close(law.moved(x, tau, rho, mean), at, rtol=0, atol=1e-6)


@each_law
def test_maps_compose(law: Law) -> None:
    x, tau, mean = points()
    through = law.moved(law.moved(x, tau, 0.6 * tau, mean), 0.6 * tau, 0.1 * tau, mean)
    torch.testing.assert_close(law.moved(x, tau, 0.1 * tau, mean), through, rtol=0, atol=1e-10)


@each_law
@each_path
def test_roles_answer_the_law_on_every_path(law: Law, path: NoisePath) -> None:
    x, tau, mean = points()
    made, condition = roles(law, path), batch().condition
    torch.testing.assert_close(made["teacher"].velocity(x, tau, condition), law.velocity(x, tau, mean), rtol=0, atol=1e-9)
    end = law.moved(x, tau, 0 * tau, mean)
    torch.testing.assert_close(made["student"].data(x, tau, condition), end, rtol=0, atol=1e-9)


# --- continuous time -----------------------------------------------------------------------------------


@each_law
@each_path
@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_the_tangent_vanishes_at_the_exact_student(law: Law, path: NoisePath, r: float) -> None:
    """With r = 1 the residual is zero for the exact student; the teacher as the student leaves one, and so does r < 1."""
    x, tau, _ = points()
    made, condition = roles(law, path), batch().condition
    v = made["teacher"].velocity(x, tau, condition)
    sizes = {}
    for name in ("student", "teacher"):
        old, slope = tangent(made[name], x, tau, condition, v, torch.ones_like(tau))
        sizes[name] = float(residual(x, tau, v, old, slope, r).abs().max())
    if r == 1.0:
        assert sizes["student"] < 1e-8
    else:
        assert sizes["student"] > 1e-2, "warm-up leaves the first half of the tangent alone"
    assert sizes["teacher"] > 1e-2 or r == 0.0


@pytest.mark.parametrize("s", [1.0, 2.0, 5.0])
def test_the_direction_is_the_guided_teachers(s: float) -> None:
    """Of two Gaussians, guidance is linear: the student that ends where the guided flow ends has no tangent along the
    guided velocity; along the line from data to noise it has, as soon as s is not 1."""
    path, law = Flow(), Gaussian()
    x, tau, mean = points()
    made, rows = roles(law, path), batch()
    empty = rows.empty.tensors["encoder_hidden_states"]
    # Guided by s, the velocity is that of the mean u + s (c - u): linear in the mean.
    aim = dataclasses.replace(rows, condition=type(rows.condition)({"encoder_hidden_states": guided(empty, mean, s)}))
    v = Guided(made["teacher"], rows.empty, s).velocity(x, tau, rows.condition)
    torch.testing.assert_close(v, made["teacher"].velocity(x, tau, aim.condition), rtol=0, atol=1e-12)
    one = torch.ones_like(tau)
    old, change = tangent(made["student"], x, tau, aim.condition, v, one)
    assert float(residual(x, tau, v, old, change, 1.0).abs().max()) < 1e-12
    errors = [float((tangent(made["student"], x, tau, aim.condition, v, one, h)[1] - change).norm()) for h in (0.004, 0.002)]
    assert errors[1] < 1e-3 and 3.6 < errors[0] / errors[1] < 4.4, "a difference along it is of second order"
    unguided = made["teacher"].velocity(x, tau, rows.condition)
    _, other = tangent(made["student"], x, tau, aim.condition, unguided, one)
    away = float((other - change).norm() / change.norm())
    assert away < 1e-12 if s == 1.0 else away > 0.1


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_loss_of_scm_and_its_gradient_are_those_of_the_formula(adaptive: bool) -> None:
    """|g / (|g| + 0.1)|^2 / tan exp(-l) + l, whose slope in F is -2 g / (D tan) exp(-l)."""
    rows, path, step = batch(), Flow(), 3
    made = roles(Mixture(), path, None)
    state = SCM(scale=2, warmup=8, adaptive=adaptive).start(facts(made))
    draw = Draw(0, step, range(7))
    assert rows.x0 is not None
    tau = (0.9 + 1.6 * draw.gaussian("time")).exp().atan()
    x = turned(rows.x0, -draw.normal("noise", rows.x0), tau)
    v = Guided(made["teacher"], rows.empty, 2.0).velocity(x, tau, rows.condition)
    c, n = spread(tau.cos(), x), spread(tau.sin(), x)
    # As the paper has it: the network is differentiated along (cos sin v, cos sin).
    old, change = tangent(made["student"], x, tau, rows.condition, c * n * v, tau.cos() * tau.sin())
    g = -c * c * (old - v) - 4 / 8 * (c * n * x + change)
    g = g / (g.square().mean(1, keepdim=True).sqrt() + 0.1)
    level = 0.25 if adaptive else 0.0
    if adaptive:
        torch.nn.init.constant_(state.weighting.last.bias, level)  # type: ignore[attr-defined]
    losses = rows_of(state, rows, step)
    torch.testing.assert_close(losses, g.square().mean(1) / tau.tan() * math.exp(-level) + level, rtol=1e-9, atol=0)
    losses.sum().backward()
    slope = -2 * math.exp(-level) * (g / spread(tau.tan(), g)).sum(0) / gaussians.WIDTH
    torch.testing.assert_close(made["student"].parameters()["off"].grad, slope, rtol=1e-9, atol=1e-12)


# --- discrete time -------------------------------------------------------------------------------------


@each_law
def test_the_residual_of_one_ddim_step_is_of_second_order(law: Law) -> None:
    x, tau, mean = points()
    sizes = []
    for h in (0.08, 0.04, 0.02, 0.01):
        back = turned(x, law.velocity(x, tau, mean), torch.full_like(tau, h))
        sizes.append(float((law.moved(back, tau - h, 0 * tau, mean) - law.moved(x, tau, 0 * tau, mean)).norm()))
    ratios = [a / b for a, b in itertools.pairwise(sizes)]
    assert all(3.4 < ratio < 4.6 for ratio in ratios) and 3.8 < ratios[-1] < 4.2


@each_law
@pytest.mark.parametrize("full", [False, True], ids=["lora", "whole"])
def test_the_loss_of_lcm_falls_with_its_grid(law: Law, full: bool) -> None:
    """At the exact student squares are O(h^4): its only error is the solver's."""
    sizes = []
    for grid in (40, 80, 160):
        method = LCM(scale=1, told=False, grid=grid, huber=0) if full else LCMLoRA(scale=1, grid=grid, huber=0)
        made = roles(law, Flow(), names=method.trains)
        loss = method.start(facts(made)).loss("student", batch(), Halfway(0, 0, range(7)), 0, {})
        sizes.append(float(loss.rows.detach().mean()))
    assert 11 < sizes[0] / sizes[1] < 22 and 13 < sizes[1] / sizes[2] < 19, sizes


def test_at_the_lowest_step_lcm_aims_at_the_data_of_the_teacher() -> None:
    """tau' = 0: the target is x' itself, even if the target network answers nonsense there."""
    made = roles(Gaussian(), Flow())
    state = LCMLoRA(scale=1, grid=1, huber=0).start(facts(made))
    rows = batch()
    assert rows.x0 is not None
    noise = Draw(0, 5, range(len(rows))).normal("noise", rows.x0)
    tau = torch.full((len(rows),), math.pi / 2, dtype=torch.float64)
    aim = made["teacher"].data(noise, tau, rows.condition)
    mine = made["student"].data(noise, tau, rows.condition)
    torch.testing.assert_close(rows_of(state, rows), (mine - aim).square().mean(1))
    with torch.no_grad():
        made["student"].host.network.off += 1e-3  # type: ignore[operator]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rows_of(state, rows), (mine - aim).square().mean(1))
