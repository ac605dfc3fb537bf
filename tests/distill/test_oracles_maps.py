"""Flow maps, guidance and halving against closed forms in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from hasten.distill.loop.draw import Draw
from hasten.distill.method import MethodState
from hasten.distill.methods.guidance import Guidance
from hasten.distill.methods.meanflow import MeanFlow, in_flow_time
from hasten.distill.methods.progressive import Progressive, chord
from hasten.distill.network.few_steps import sample
from hasten.distill.network.paths import Flow, NoisePath, guided, spread, turned
from tests.distill.gaussians import Gaussian, Law, Mixture, batch, roles
from tests.distill.oracles import Halfway, each_law, each_path, facts, hear, mean_of, points, rows_of

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
