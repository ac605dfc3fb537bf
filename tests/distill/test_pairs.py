"""Distillation on stored pairs: where the student is asked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from hasten.distill.data.teach import make_pairs
from hasten.distill.loop.draw import Draw
from hasten.distill.methods.pairs import Pairs
from hasten.distill.network.few_steps import FewSteps, sample
from hasten.distill.network.paths import Flow, NoisePath, VariancePreserving
from hasten.errors import RecipeError, UsageError
from hasten.pipelines import loading
from tests.distill.toys import store, trainer

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
NOISE = VariancePreserving((1 - BETAS).cumprod(0))
"""PixArt's table."""


def state(tmp_path: Path, method: Pairs, path: NoisePath) -> tuple[object, object]:
    made = trainer(method, tmp_path, path=path)
    with torch.no_grad():
        for parameter in made.roles["student"].parameters().values():
            parameter.add_(0.1)
    return made.state, store().batch(torch.arange(6), Draw(0, 0, range(6)))


@pytest.mark.parametrize("path", [Flow(), NOISE], ids=["flow", "noise"])
def test_one_call_is_asked_with_the_noise_itself(tmp_path: Path, path: NoisePath) -> None:
    draw = Draw(0, 0, range(6))
    straight, batch = state(tmp_path / "a", Pairs(), path)
    own, _ = state(tmp_path / "b", Pairs(own=True), path)
    x, tau = straight._straight(batch, draw)
    assert_close(x, batch.z, atol=1e-6, rtol=1e-6)
    assert float(tau[0]) == path.start or abs(float(tau[0]) - path.start) < 1e-6
    one, two = (each.loss("student", batch, draw, 0, {}).rows for each in (straight, own))
    assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_a_noise_predictor_is_told_a_time_with_some_signal() -> None:
    assert 0.068 <= float(torch.cos(torch.tensor(NOISE.start))) < 0.07 and NOISE.start < NOISE.end
    velocity = VariancePreserving((1 - BETAS).cumprod(0), "v_prediction")
    assert velocity.start == velocity.end, "velocity says something of the data everywhere"


@pytest.mark.parametrize("path", [Flow(), NOISE], ids=["flow", "noise"])
def test_its_own_way_is_the_one_it_is_sampled_on(tmp_path: Path, path: NoisePath) -> None:
    made, batch = state(tmp_path, Pairs(calls=3, own=True), path)
    seen = set()
    for step in range(20):
        draw = Draw(0, step, range(6))
        with torch.no_grad():
            x, tau, _ = made._walked(batch, draw)
            end = made.roles["student"].data(x, tau, batch.condition)
            call = made.steps.angles.index(float(tau[0]))
            if call == 2:
                assert_close(end, sample(made.roles["student"], batch.z, batch.condition, made.steps), atol=1e-6, rtol=1e-5)
        assert not x.requires_grad and (call > 0 or torch.equal(x, batch.z))
        seen.add(call)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("path", [Flow(), NOISE], ids=["flow", "noise"])
def test_on_the_teachers_way_a_perfect_student_has_no_loss(tmp_path: Path, path: NoisePath, own: bool) -> None:
    """The way is what the student itself walks; then nothing is left to learn, and elsewhere there is."""
    made, batch = state(tmp_path, Pairs(calls=4, way=True, own=own), path)
    student = made.roles["student"]
    with torch.no_grad():
        stops = [
            sample(student, batch.z, batch.condition, FewSteps(made.steps.angles[:calls], "ode")) for calls in range(1, 5)
        ]
        x, way = batch.z, []
        for tau, after in zip(made.steps.angles, made.steps.angles[1:], strict=False):
            angle = torch.full((len(x),), tau, dtype=torch.float64)
            velocity = student.velocity(x, angle, batch.condition)
            x = math.cos(tau - after) * x - math.sin(tau - after) * velocity
            way.append(x)
    known = replace(batch, x0=stops[-1], way=torch.stack(way, 1))
    wrong = replace(known, way=known.way + 0.1)
    for step in range(6):
        draw = Draw(0, step, range(6))
        rows = made.loss("student", known, draw, step, {}).rows
        assert rows.shape == (6,) and float(rows.detach().max()) < 1e-10
        assert own or float(made.loss("student", wrong, draw, step, {}).rows.detach().max()) > 1e-4


@pytest.mark.long
def test_the_teachers_points_are_where_its_loop_was() -> None:
    """With a step of the teacher at each point, they are the latents of its own loop; between steps, on the arc."""
    pipe, seen = loading.open_pipeline("tiny-flux", quiet=True), {}

    def keep(pipe: object, number: int, time: object, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen[number] = given["latents"]
        return {}

    call = {"num_inference_steps": 8, "guidance_scale": 1.0, "sigmas": [k / 8 for k in range(8, 0, -1)]}
    kept = make_pairs(pipe, ["a three"], 2, batch=2, points=4, **call)
    pipe(prompt=["a three"] * 2, latents=kept.z, output_type="latent", callback_on_step_end=keep, **call)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[1:]]
    assert kept.way.shape == (2, 3, *kept.z.shape[1:])
    for number, share in enumerate((0.75, 0.5, 0.25)):
        at = min(range(8), key=lambda k: abs(sigmas[k] - share))
        r = math.hypot(sigmas[at], 1 - sigmas[at])
        if abs(sigmas[at] - share) < 1e-6:
            assert_close(kept.way[:, number], seen[at] / r, atol=1e-5, rtol=1e-5)
    assert any(abs(sigma - share) < 1e-6 for sigma in sigmas for share in (0.75, 0.5, 0.25))
    assert "forward" not in vars(pipe.transformer), "the network is as it was"
    with pytest.raises(UsageError, match="too few for points at 4 calls"):
        make_pairs(pipe, ["a three"], 1, points=4, num_inference_steps=2)


def test_the_way_needs_several_calls() -> None:
    with pytest.raises((RecipeError, ValueError), match="calls is 1"):
        Pairs(way=True)
