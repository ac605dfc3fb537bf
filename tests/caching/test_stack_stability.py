"""SADA's criterion on the stream: its formula on known paths, the order of tokens, and what it does in a stack."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hasten.caching.stack_signals import Evidence
from hasten.caching.stack_stability import PathStability, StreamPath, UnstableTokens
from hasten.step import Step
from tests.contract import seeded


def path(streams: list[Tensor], times: list[float]) -> StreamPath:
    found = StreamPath()
    for time, stream in zip(times, streams, strict=True):
        found.see(time, stream)
    return found


def test_equal_steps_give_the_coefficients_of_the_textbook() -> None:
    h, x = -0.1, [seeded(i, 1, 3, 4) for i in range(4)]
    y0, y1, y2 = ((b - a) / h for a, b in pairwise(x))
    found = path(x, [1.0, 0.9, 0.8, 0.7]).deviation_and_bend()
    assert found is not None
    torch.testing.assert_close(found[0], x[3] - (x[2] + h * (23 * y2 - 16 * y1 + 5 * y0) / 12), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], (y2 - 2 * y1 + y0) / h**2, rtol=1e-4, atol=1e-2)


def test_a_straight_path_at_uneven_speed_has_neither() -> None:
    times = [1.0, 0.93, 0.7, 0.66]
    found = path([seeded(0, 1, 3, 4) * time + seeded(1, 1, 3, 4) for time in times], times).deviation_and_bend()
    assert found is not None
    assert float(found[0].abs().max()) < 1e-5 and float(found[1].abs().max()) < 1e-3


def one(power: float, times: list[float]) -> list[Tensor]:
    return [torch.full((1, 1, 2), (1.0 - time) ** power) for time in times]


def read(streams: list[Tensor], times: list[float]) -> float:
    state, found = PathStability().start(), None
    for index, (time, stream) in enumerate(zip(times, streams, strict=True)):
        found = state.measure(Step(index, 50, time), Evidence([stream], [], stream))
    assert isinstance(found, Tensor)
    return float(found)


def test_the_sign_tells_whether_the_bend_shrinks() -> None:
    """Along s = 1 - t: s^1.5 bends less and less, so the step is stable; s^4 bends more and more."""
    times = [0.8, 0.7, 0.6, 0.5]
    assert read(one(1.5, times), times) == pytest.approx(-1.0, abs=1e-3)
    assert read(one(4.0, times), times) == pytest.approx(1.0, abs=1e-3)


def test_the_least_stable_tokens_are_picked() -> None:
    times, state = [0.8, 0.7, 0.6, 0.5], UnstableTokens(share=0.5).start()
    for index, time in enumerate(times):
        token = [one(power, [time])[0] for power in (1.5, 4.0, 1.2, 5.0)]
        state.see(Step(index, 50, time), torch.cat(token, dim=1), computed=index != 2)
    assert state.pick(2).tolist() == [1, 3]


def test_it_is_unknown_until_the_path_is_long_enough() -> None:
    state, x = PathStability().start(), seeded(0, 1, 3, 4)
    for index in range(3):
        assert state.measure(Step(index, 50, 1 - index / 50), Evidence([x], [], x)) is None
    assert state.measure(Step(3, 50, 0.9), Evidence([x], [], x)) is not None
    assert state.measure(Step(4, 50, 0.8), Evidence([x], [], x[:, :2])) is None, "another size is another path"


def test_when_the_chosen_tokens_run() -> None:
    step = Step(9, 50, 0.5)
    always, paper = UnstableTokens(), UnstableTokens(when="unstable")
    assert always.runs(step, -0.5) and always.runs(step, 0.5) and always.runs(step, None)
    assert not paper.runs(step, -0.5) and paper.runs(step, 0.0) and paper.runs(step, None)
