"""Distillation on stored pairs: where the student is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from hasten.distill.loop.draw import Draw
from hasten.distill.methods.pairs import Pairs
from hasten.distill.network.few_steps import sample
from hasten.distill.network.paths import Flow, NoisePath, VariancePreserving
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
            x, tau = made._walked(batch, draw)
            end = made.roles["student"].data(x, tau, batch.condition)
            call = made.steps.angles.index(float(tau[0]))
            if call == 2:
                assert_close(end, sample(made.roles["student"], batch.z, batch.condition, made.steps), atol=1e-6, rtol=1e-5)
        assert not x.requires_grad and (call > 0 or torch.equal(x, batch.z))
        seen.add(call)
    assert seen == {0, 1, 2}
