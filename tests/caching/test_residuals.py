"""Forecast errors are measured in what the solver receives, however the host combines its branches."""

from __future__ import annotations

import pytest
import torch

from hasten.caching.residuals import Residuals
from hasten.step import Step
from tests.contract import seeded


def read(residuals: Residuals) -> tuple[Step, float | None] | None:
    return residuals.read([float(value) for value in residuals.pending()])


@pytest.mark.parametrize("guidance", [1.0, 2.0, 7.5, -1.0])
@pytest.mark.parametrize("batched", [False, True])
def test_error_of_guided_branches(guidance: float, batched: bool) -> None:
    residuals = Residuals()
    for index in range(3):
        step = Step(index, 10, 1 - index / 10)
        cond, uncond = seeded(2 * index, 1, 4, 5), seeded(2 * index + 1, 1, 4, 5)
        off_cond, off_uncond = 0.1 * seeded(50 + index, 1, 4, 5), 0.1 * seeded(70 + index, 1, 4, 5)
        if batched:
            output = torch.cat([uncond, cond])
            estimate = output + torch.cat([off_uncond, off_cond]) if index else None
            residuals.computed(step, output, estimate)
        else:
            residuals.computed(step, cond, cond + off_cond if index else None)
            residuals.computed(Step(index, 10, step.time, 1), uncond, uncond + off_uncond if index else None)
        residuals.combined(uncond + guidance * (cond - uncond))
        told = read(residuals)
        assert told is not None and told[0].index == index
        if index == 0:
            assert told[1] is None
        else:
            expected = (off_uncond + guidance * (off_cond - off_uncond)).square().mean().sqrt()
            assert told[1] == pytest.approx(float(expected), rel=1e-3)


def test_predicted_variances_are_left_out() -> None:
    residuals = Residuals()
    for index in range(2):
        output = seeded(index, 2, 6, 3)
        residuals.computed(Step(index, 9, 1 - index / 9), output, output + 1.0 if index else None)
        residuals.combined(output[:, :3])
        told = read(residuals)
    assert told is not None and told[1] == pytest.approx(1.0, rel=1e-5)


def test_a_combination_that_is_not_linear_is_measured_on_the_first_branch() -> None:
    residuals = Residuals()
    for index in range(2):
        step, cond, uncond = Step(index, 9, 1 - index / 9), seeded(index, 1, 400), seeded(index + 9, 1, 400)
        residuals.computed(step, cond, cond + 0.5 if index else None)
        residuals.computed(Step(index, 9, step.time, 1), uncond, uncond + 3.0 if index else None)
        residuals.combined(torch.sin(9 * cond) * uncond.square())
        told = read(residuals)
    assert told is not None and told[1] == pytest.approx(0.5, rel=1e-4)


def test_nothing_is_held_between_steps() -> None:
    residuals = Residuals()
    output = seeded(0, 1, 8)
    residuals.computed(Step(0, 5, 1.0), output, None)
    residuals.combined(output)
    read(residuals)
    assert not residuals._outputs and not residuals._off and not residuals.pending()
