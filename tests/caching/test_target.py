"""What is forecast in place of the output, and that the way there and back loses nothing."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.target import Of, from_target, to_target
from hasten.forecast import Hold, Polynomial
from hasten.level import Level
from hasten.step import Step
from tests.contract import seeded, steps

OFS = get_args(Of)
SHAPES = [
    ((2, 4, 6, 6), (2, 4, 6, 6)),
    ((2, 4, 6, 6), (2, 8, 6, 6)),  # PixArt: a variance beside the mean
    ((2, 9, 6, 6), (2, 4, 6, 6)),  # inpainting: mask and image beside the latents
    ((2, 12, 16), (2, 12, 8)),  # FLUX Fill, in tokens
    ((2, 4, 6, 6), (2, 7)),  # another kind of output
]


def at(sigma: float, prediction: str = "flow") -> Step:
    if prediction == "flow":
        return Step(3, 10, sigma, 0, None, Level(1 - sigma, sigma, (1.0, -sigma)))
    alpha = math.sqrt(1 - sigma**2)
    data = {"epsilon": (1 / alpha, -sigma / alpha), "v": (alpha, -sigma)}[prediction]
    return Step(3, 10, math.asin(sigma) * 2 / math.pi, 0, None, Level(alpha, sigma, data))


@pytest.mark.parametrize("of", OFS)
@pytest.mark.parametrize(("shape_x", "shape_y"), SHAPES, ids=str)
def test_there_and_back_is_the_same_output(of: Of, shape_x: tuple[int, ...], shape_y: tuple[int, ...]) -> None:
    x, y, step = seeded(0, *shape_x), seeded(1, *shape_y), at(0.4)
    kept = to_target(of, step, x, y)
    assert kept is not None and kept.shape == y.shape and kept.data_ptr() != y.data_ptr()
    back = from_target(of, step, x, kept, y.dtype)
    assert back is not None and back.data_ptr() != kept.data_ptr()
    torch.testing.assert_close(back, y)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 0.99), st.sampled_from(["flow", "epsilon", "v"]))
def test_data_is_the_data(sigma: float, prediction: str) -> None:
    step = at(sigma, prediction)
    assert step.level is not None
    data, noise, alpha = seeded(0, 1, 8).double(), seeded(1, 1, 8).double(), step.level.alpha
    outputs = {"flow": noise - data, "epsilon": noise, "v": alpha * noise - sigma * data}
    kept = to_target("data", step, alpha * data + sigma * noise, outputs[prediction])
    assert kept is not None
    torch.testing.assert_close(kept, data)


@pytest.mark.parametrize("sigma", [0.02, 0.5, 0.99])
def test_half_precision_comes_back_as_exact_as_it_was(sigma: float) -> None:
    x, y = seeded(0, 1, 256, dtype=torch.bfloat16), seeded(1, 1, 256, dtype=torch.bfloat16)
    kept = to_target("data", at(sigma), x, y)
    assert kept is not None and kept.dtype == torch.float32
    back = from_target("data", at(sigma), x, kept, y.dtype)
    assert back is not None and back.dtype == torch.bfloat16
    assert torch.equal(back, y)


def field(x: Tensor, t: float) -> Tensor:
    """A flow whose data estimate x - t v is the same at every time: the path is a straight line to it."""
    return (x - seeded(5, 1, 8)) / t


@pytest.mark.parametrize(("of", "exact"), [("data", True), ("residual", False)])
def test_held_data_is_exact_where_the_data_stands_still(of: Of, exact: bool) -> None:
    policy = NetworkReuse(rule=Every(interval=4), forecast=Hold(), of=of)
    assert (_off(policy) < 1e-4) == exact


def _off(policy: NetworkReuse) -> float:
    """Distance of a run with `policy` from the data that `field` leads to."""
    state, x = policy.start(), seeded(6, 1, 8)
    for plain in steps(20):
        step = Step(plain.index, 20, plain.time, 0, plain.weight, Level(1 - plain.time, plain.time, (1.0, -plain.time)))
        answer = state.answer(step, x) if state.decide(step, x) else None
        v = state.observe(step, x, [field(x, step.time)])[0] if answer is None else answer[0]
        assert step.weight is not None
        x = x + step.weight * v
    return float((x - seeded(5, 1, 8)).abs().max())


def test_without_a_level_data_is_computed_and_said() -> None:
    policy = NetworkReuse(rule=Every(interval=2), of="data", axis="log_snr")
    state, x = policy.start(), seeded(0, 1, 8)
    for step in steps(6):
        if state.decide(step, x):
            assert state.answer(step, x) is None
        given_y = seeded(step.index, 1, 8)
        assert state.observe(step, x, [given_y])[0] is given_y
    told = policy.remarks([1.0, 0.5], [None, None], [None, None])
    assert len(told) == 2 and "data" in told[0] and "log-SNR" in told[1]
    assert policy.remarks([1.0], [None], [at(0.5).level]) == []
    assert "corrected" in NetworkReuse(correct=1).remarks([1.0], [None], [None])[0]


def test_log_snr_axis_is_exact_on_polynomials_of_log_snr_and_time_is_not() -> None:
    def off(axis: str) -> float:
        state = NetworkReuse(rule=Every(interval=2), forecast=Polynomial(order=1), axis=axis).start()  # type: ignore[arg-type]
        run = [at(s) for s in (0.9, 0.6, 0.2)]
        values = [seeded(0, 1, 8) * step.level.log_snr for step in run if step.level is not None]
        for step, value in zip(run[:2], values[:2], strict=True):
            state.observe(step, seeded(1, 1, 8), [value])
        answer = state.answer(run[2], seeded(1, 1, 8))
        assert answer is not None
        return float((answer[0] - values[2]).abs().max())

    assert off("log_snr") < 1e-5 and off("time") > 0.1
