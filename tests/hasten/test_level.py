"""Noise levels against what diffusers' own solvers compute from the same numbers."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from hasten.clock import Clock
from hasten.level import Level
from hasten.scheduler import solver_levels, solver_times
from tests.contract import seeded
from tests.hasten.test_step_clock import solver

FLOW = {"flow euler", "flow heun", "flow unipc"}


def levels(name: str, num: int = 10) -> tuple[Any, list[Level | None]]:
    scheduler = solver(name, num)
    return scheduler, solver_levels(scheduler, solver_times(scheduler), flow=name in FLOW)


def clean(level: Level, x: Tensor, y: Tensor) -> Tensor:
    assert level.data is not None
    return level.data[0] * x + level.data[1] * y


@pytest.mark.parametrize("name", ["dpm++", "dpm++ karras", "flow unipc"])
def test_data_is_what_a_multistep_solver_consumes(name: str) -> None:
    """DPM-Solver++ and UniPC turn each output into a data prediction before anything else."""
    scheduler, found = levels(name)
    x = seeded(0, 1, 4, 4, 4, dtype=torch.float64)
    for i, time in enumerate(scheduler.timesteps):
        y, level = seeded(i + 1, 1, 4, 4, 4, dtype=torch.float64), found[i]
        scheduler._step_index = i
        theirs = scheduler.convert_model_output(y, sample=x)
        assert level is not None
        torch.testing.assert_close(clean(level, x, y), theirs.double(), rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))
        assert torch.is_tensor(time)


@pytest.mark.parametrize("name", ["ddim trailing", "ddim leading", "euler", "euler karras", "euler svd"])
def test_data_is_the_solvers_own_clean_estimate(name: str) -> None:
    scheduler, found = levels(name)
    x = seeded(0, 1, 4, 4, 4)
    for i, time in enumerate(scheduler.timesteps):
        y, level = seeded(i + 1, 1, 4, 4, 4), found[i]
        seen = scheduler.scale_model_input(x, time)
        out = scheduler.step(y, time, x)
        assert level is not None
        theirs = out.pred_original_sample
        torch.testing.assert_close(clean(level, seen, y), theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))
        x = out.prev_sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("angle", [0.2, 0.8, 1.4])
def test_velocity_is_the_derivative_along_the_unit_circle(prediction: str, angle: float) -> None:
    data, noise = seeded(0, 6, dtype=torch.float64), seeded(1, 6, dtype=torch.float64)
    alpha, sigma = math.cos(angle), math.sin(angle)
    if prediction == "flow":
        total = alpha + sigma
        alpha, sigma = alpha / total, sigma / total
        level = Level(alpha, sigma, (1.0, -sigma))
    else:
        maps = {"epsilon": (1 / alpha, -sigma / alpha), "v_prediction": (alpha, -sigma), "sample": (0.0, 1.0)}
        level = Level(alpha, sigma, maps[prediction])
    outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma * data, "sample": data, "flow": noise - data}
    x, y, velocity = alpha * data + sigma * noise, outputs[prediction], level.velocity
    assert velocity is not None and level.angle == pytest.approx(angle)
    torch.testing.assert_close(clean(level, x, y), data)
    torch.testing.assert_close(velocity[0] * x + velocity[1] * y, math.cos(angle) * noise - math.sin(angle) * data)


def test_log_snr_falls_with_noise_and_is_finite_at_both_ends() -> None:
    values = [Level(1 - s, s).log_snr for s in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert values == sorted(values, reverse=True) and all(map(math.isfinite, values))
    assert values[2] == 0.0 and values[1] == pytest.approx(math.log(9))


def test_an_output_that_says_nothing_has_no_data() -> None:
    """A preconditioned network, no noise left, a solver without levels: no map rather than a division by zero."""
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(10)
    found = solver_levels(scheduler, solver_times(scheduler), flow=False)
    assert all(level is not None and level.data is None and level.velocity is None for level in found)
    assert Level(1.0, 0.0, (1.0, 0.0)).velocity is None
    assert solver_levels(object(), [0.5], flow=False) == [None]
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    assert solver_levels(flow, [1.0, 0.0], flow=True) == [Level(0.0, 1.0, (1.0, -1.0)), Level(1.0, 0.0, None)]


def test_the_clock_hands_the_level_on() -> None:
    scheduler, clock = solver("flow euler"), Clock()
    clock.follow(scheduler)
    scheduler.set_timesteps(4)
    entered = clock.enter("net", None, None, scheduler.timesteps[0])
    assert entered is not None and entered[0].level is not None
    assert entered[0].level.sigma == pytest.approx(entered[0].time)
