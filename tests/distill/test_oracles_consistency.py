"""Consistency methods against closed forms in float64: exact networks have nothing left to learn, wrong ones have."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Method, MethodState
from hasten.distill.methods.guidance import Guidance
from hasten.distill.methods.lcm import LCM, LCMLoRA
from hasten.distill.methods.meanflow import MeanFlow, in_flow_time
from hasten.distill.methods.progressive import Progressive, chord
from hasten.distill.methods.scm import SCM, residual
from hasten.distill.network.few_steps import sample
from hasten.distill.network.jvp import tangent
from hasten.distill.network.paths import Flow, NoisePath, VariancePreserving, guided, spread, turned
from hasten.distill.network.roles import Guided
from tests.distill import gaussians
from tests.distill.gaussians import Gaussian, Law, Mixture, batch, roles

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
PATHS: dict[str, NoisePath] = {
    "flow": Flow(),
    "epsilon": VariancePreserving(TABLE),
    "v": VariancePreserving(TABLE, "v_prediction"),
}
LAWS: dict[str, Law] = {"gaussian": Gaussian(), "mixture": Mixture()}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def points(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x, tau, mean) of seven rows where x may well be."""
    rows = batch(seed=seed)
    assert rows.x0 is not None and rows.z is not None
    tau = torch.linspace(0.15, 1.45, len(rows), dtype=torch.float64)
    x = turned(rows.x0, -rows.z, tau)
    return x, tau, rows.condition.tensors["encoder_hidden_states"]


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


def facts(made: Any, steps: int = 8) -> Facts:
    return Facts(made, steps, (gaussians.WIDTH,))


def rows_of(state: MethodState, rows: Batch, step: int = 5, seed: int = 0, kept: Mapping[str, Any] | None = None) -> Tensor:
    return state.loss("student", rows, Draw(seed, step, range(len(rows))), step, kept or {}).rows


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


class Halfway(Draw):
    """The step from the middle of any grid, which is one angle for all of them."""

    def below(self, purpose: str, high: int) -> Tensor:
        return torch.full((len(self.rows),), high // 2)


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


# --- flow maps -----------------------------------------------------------------------------------------


@each_law
@each_path
def test_the_average_velocity_is_meanflows_on_every_path(law: Law, path: NoisePath) -> None:
    """U of the circle is u = (x_t - x_r) / (t - r) of flow matching, whatever the network predicts."""
    x, tau, mean = points()
    rho, flow = 0.35 * tau, Flow(1.0)
    there = law.moved(x, tau, rho, mean)
    t, r = flow.time(tau), flow.time(rho)
    u = (spread(flow.scale(tau), x) * x - spread(flow.scale(rho), x) * there) / spread(t - r, x)
    made = roles(law, path, "map")
    state = MeanFlow(scale=1).start(facts(made))
    hear(state)
    U = state.student().toward(x, tau, rho, batch().condition)  # type: ignore[union-attr]
    torch.testing.assert_close(in_flow_time(U, x, tau), u, rtol=0, atol=1e-7)
    torch.testing.assert_close(turned(x, U, tau - rho), there, rtol=0, atol=1e-8)
    torch.testing.assert_close(chord(x, there, tau - rho), U, rtol=0, atol=1e-7)


def hear(state: MethodState) -> None:
    """Make a hint tell the number itself: what `Exact` reads."""
    state.hint.module.forward = lambda number: number[:, None]  # type: ignore[attr-defined]


@each_law
@each_path
def test_meanflow_has_nothing_to_teach_the_exact_map(law: Law, path: NoisePath) -> None:
    made, rows = roles(law, path, "map"), batch(40)
    state = MeanFlow(scale=1, power=0, instant=0.3, whole=0.0).start(facts(made))
    hear(state)
    losses = rows_of(state, rows)
    assert float(losses.detach().max()) < 1e-10
    # an exact consistency model is another map
    other = MeanFlow(scale=1, power=0, instant=0.3).start(facts(roles(law, path, "end")))
    hear(other)
    assert float(rows_of(other, rows).detach().mean()) > 1e-3


def test_from_noise_to_data_at_once_is_part_of_it() -> None:
    rows = batch(12)
    made = roles(Gaussian(), Flow(), "map")
    state = MeanFlow(scale=1, power=0, whole=1.0).start(facts(made))
    hear(state)
    assert float(rows_of(state, rows).detach().max()) < 1e-20
    tau, rho = state._times(Draw(0, 5, range(12)))  # type: ignore[attr-defined]
    assert bool((tau == 1).all()) and bool((rho == 0).all())


@each_law
def test_a_map_is_sampled_in_any_number_of_calls(law: Law) -> None:
    """All of them end where the trajectory ends; DDIM's steps with the teacher do not."""
    made, rows = roles(law, Flow(), "map"), batch()
    assert rows.z is not None
    tau = torch.full((7,), math.pi / 2, dtype=torch.float64)
    end = law.moved(rows.z, tau, 0 * tau, mean_of(rows))
    for calls in (1, 2, 5):
        state = MeanFlow(scale=1, calls=calls).start(facts(made))
        hear(state)
        steps = state.sampler()
        assert steps is not None and len(steps.angles) == calls and steps.how == "map"
        torch.testing.assert_close(sample(state.student(), rows.z, rows.condition, steps), end, rtol=0, atol=1e-9)
    plain = sample(made["teacher"], rows.z, rows.condition, dataclasses.replace(steps, how="ode"))
    assert float((plain - end).abs().max()) > 1e-2


def test_rows_of_meanflow_weigh_by_their_own_size() -> None:
    losses = []
    for power in (0.0, 1.0, 0.5):
        made = roles(Mixture(), Flow(), None)
        losses.append(rows_of(MeanFlow(scale=2, power=power).start(facts(made)), batch()).detach())
    torch.testing.assert_close(losses[1], losses[0] / (losses[0] + 1e-3))
    torch.testing.assert_close(losses[2], losses[0] / (losses[0] + 1e-3).sqrt())


# --- guidance and halving ----------------------------------------------------------------------------


def test_a_student_that_hears_the_scale_equals_the_guided_teacher() -> None:
    """Guidance of a Gaussian moves its mean: a student about that mean has no loss at s, and one elsewhere."""
    rows = batch()
    made = roles(Gaussian(), Flow(), None)
    assert float(rows_of(Guidance(scale=1).start(facts(made)), rows).detach().max()) < 1e-24
    assert float(rows_of(Guidance(scale=3).start(facts(made)), rows).detach().max()) > 1e-3
    mean, empty = rows.condition.tensors["encoder_hidden_states"], rows.empty.tensors["encoder_hidden_states"]
    network: Any = made["student"].host.network
    plain = network.law.velocity
    network.law = Gaussian()
    network.law.velocity = lambda x, tau, mean: plain(x, tau, guided(empty, mean, 3.0))
    assert float((mean - empty).abs().min()) > 0
    assert float(rows_of(Guidance(scale=3).start(facts(made)), rows).detach().max()) < 1e-24


def test_every_row_has_a_scale_of_its_own() -> None:
    """The guided velocity is s - 1 times c - u away from the conditional one."""
    rows, draw = batch(), Draw(0, 5, range(7))
    made = roles(Mixture(), Flow(), None)
    assert rows.x0 is not None
    tau = Flow(1.0).angle(draw.uniform("time"))
    x = turned(rows.x0, -draw.normal("noise", rows.x0), tau)
    c = made["teacher"].velocity(x, tau, rows.condition)
    u = made["teacher"].velocity(x, tau, rows.empty.rows(torch.zeros(7, dtype=torch.int64)))
    s = 1 + 2 * draw.uniform("scale")
    assert float(s.std()) > 0.1
    expected = ((s - 1)[:, None] * (c - u)).square().mean(1)
    torch.testing.assert_close(rows_of(Guidance(scale=(1, 3), told=True).start(facts(made)), rows), expected)


def test_halving_ends_where_two_steps_end() -> None:
    """The exact map as teacher and student of one count: two exact steps are one exact step."""
    made = roles(Gaussian(), Flow(), None, names=("student", "before"))
    state = Progressive(scale=1, first=2, calls=1).start(facts(made, 8))
    assert [state.stage(k) for k in range(8)] == [0] * 4 + [1] * 4  # type: ignore[attr-defined]
    assert [told(state, k) for k in range(8)] == [1, 1, 1, 0, 1, 1, 1, 1]
    rows = batch()
    x, _, mean = points()
    law, path = Gaussian(), Flow()
    angles = torch.tensor([1.2, 0.8, 0.3], dtype=torch.float64)[:, None].expand(3, 7)
    half = turned(x, law.velocity(x, angles[0], mean), angles[0] - angles[1])
    there = turned(half, law.velocity(half, angles[1], mean), angles[1] - angles[2])
    U = chord(x, there, angles[0] - angles[2])
    torch.testing.assert_close(turned(x, U, angles[0] - angles[2]), there, rtol=0, atol=1e-13)
    # The third of four steps is two of the teacher's eight, which are even in the network's own time.
    assert rows.x0 is not None
    draw, mean = Halfway(0, 0, range(len(rows))), mean_of(rows)
    one, two, three = (path.angle(torch.full((len(rows),), t, dtype=torch.float64)) for t in (500.0, 375.0, 250.0))
    x = turned(rows.x0, -draw.normal("noise", rows.x0), one)
    half = turned(x, law.velocity(x, one, mean), one - two)
    aim = chord(x, turned(half, law.velocity(half, two, mean), two - three), one - three)
    expected = (law.velocity(x, one, mean) - aim).square().mean(1)
    found = Progressive(scale=1, first=4, calls=4).start(facts(made, 8)).loss("student", rows, draw, 0, {}).rows
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def told(state: MethodState, step: int) -> float:
    rows_of(state, batch(), step)
    return state.decay("before")


def mean_of(rows: Batch) -> Tensor:
    return rows.condition.tensors["encoder_hidden_states"]


# --- every method ------------------------------------------------------------------------------------

METHODS: tuple[Method, ...] = (
    LCM(scale=(1, 3)), LCMLoRA(scale=(1, 3)), SCM(scale=2, warmup=2, top=0.3), SCM(scale=(1, 3), told=True, adaptive=False),
    MeanFlow(scale=2, whole=0.2), Guidance(scale=(1, 3), told=True), Progressive(first=2),
)  # fmt: skip
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)


def wrong(method: Method) -> tuple[MethodState, Any]:
    """The method on roles that have something to learn."""
    made = roles(Mixture(), Flow(), None, names=method.trains)
    return method.start(facts(made)), made


@each_method
def test_rows_do_not_know_their_neighbours(method: Method) -> None:
    """Another order of the rows, or another batch around them, gives the same losses."""
    state, _ = wrong(method)
    rows = batch()
    whole = rows_of(state, rows)
    assert whole.shape == (7,) and bool(whole.isfinite().all()) and float(whole.std()) > 0
    index = torch.tensor([4, 1, 6])
    assert rows.x0 is not None and rows.z is not None
    some = Batch(rows.condition.rows(index), rows.empty, rows.x0[index], rows.z[index], rows.shape)
    part = state.loss("student", some, Draw(0, 5, index.tolist()), 5, {}).rows
    torch.testing.assert_close(part, whole[index], rtol=1e-9, atol=1e-12)


@each_method
def test_gradients_reach_the_student_alone(method: Method) -> None:
    state, made = wrong(method)
    rows_of(state, batch()).sum().backward()
    for name, role in made.items():
        gradients = [p.grad for p in role.parameters().values() if p is not role.host.network.time_embed.linear_2.weight]
        some = any(g is not None and bool(g.any()) for g in gradients)
        assert some == (name == "student"), name


@each_method
def test_the_data_are_their_own_end(method: Method) -> None:
    """At tau = 0 whatever network gives x itself."""
    x = batch().x0
    assert x is not None
    zero, condition = torch.zeros(len(x), dtype=torch.float64), batch().condition
    student = wrong(method)[0].student()
    velocity = (
        student.toward(x, zero, zero, condition) if hasattr(student, "toward") else student.velocity(x, zero, condition)
    )
    assert torch.equal(turned(x, velocity, zero), x)


def test_teachers_and_targets_are_who_they_should_be() -> None:
    """LCM aims at its target, LCM-LoRA at the student; progressive at the guided teacher first, then at `before`."""

    def moved(method: Method, name: str, step: int) -> float:
        made = roles(Mixture(), Flow(), None, names=method.trains)
        state = method.start(facts(made, 8))
        before = rows_of(state, batch(), step).detach()
        with torch.no_grad():
            made[name].host.network.off += 0.1  # type: ignore[operator]
        return float((rows_of(state, batch(), step).detach() - before).abs().max())

    lcm = LCM(scale=(1, 3), huber=0)
    assert moved(lcm, "target", 0) > 1e-3 and moved(lcm, "teacher", 0) > 1e-4
    halving = Progressive(scale=2, first=2)
    assert moved(halving, "teacher", 0) > 1e-3 and moved(halving, "before", 0) == 0
    assert moved(halving, "teacher", 7) == 0 and moved(halving, "before", 7) > 1e-3
