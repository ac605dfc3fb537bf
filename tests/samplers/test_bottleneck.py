"""The plan of several resolutions, and the steps between any two noise levels."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import RecipeError
from hasten.level import Level
from hasten.part import parse
from hasten.recipe import Recipe, Sampler, from_yaml
from hasten.samplers.bottleneck import Bottleneck, Stage, nodes
from hasten.samplers.data_steps import noise_in, renoised, toward

SPREAD = 0.7
"""Standard deviation of the Gaussian data of these tests."""


def level(sigma: float) -> Level:
    """Variance preserving, its network predicting the data."""
    return Level(math.sqrt(1 - sigma**2), sigma, (0.0, 1.0))


def best(x: torch.Tensor, at: Level) -> torch.Tensor:
    """What the best network says of data N(0, SPREAD^2)."""
    return x * (at.alpha * SPREAD**2) / (at.alpha**2 * SPREAD**2 + at.sigma**2)


def exact(x: torch.Tensor, now: Level, after: Level) -> torch.Tensor:
    """The probability flow between two levels: it keeps the quantile."""
    spread = [math.hypot(at.alpha * SPREAD, at.sigma) for at in (now, after)]
    return x * spread[1] / spread[0]


def walked(steps: int, order: int) -> float:
    """Error of a walk from sigma 0.98 to 0.1, in even steps of lambda."""
    x = torch.tensor([1.3], dtype=torch.float64)
    low, high = level(0.98).log_snr, level(0.1).log_snr
    levels = []
    for i in range(steps + 1):
        sigma = 1 / math.sqrt(1 + math.exp(2 * (low + (high - low) * i / steps)))
        levels.append(level(sigma))
    want, before = exact(x, levels[0], levels[-1]), None
    for now, after in pairwise(levels):
        data = best(x, now)
        x = toward(x, data, now, after, before)
        before = (data, now) if order == 2 else None
    return float((x - want).abs())


@pytest.mark.parametrize("order", [1, 2])
def test_the_error_falls_with_the_order(order: int) -> None:
    assert walked(40, order) / walked(80, order) == pytest.approx(2**order, rel=0.2)


def test_a_step_of_first_order_is_ddim_and_on_a_flow_euler() -> None:
    g = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    now, after = level(0.8), level(0.3)
    torch.testing.assert_close(toward(renoised(data, noise, now), data, now, after), renoised(data, noise, after))
    now, after = Level(0.2, 0.8), Level(0.7, 0.3)
    x = renoised(data, noise, now)
    torch.testing.assert_close(toward(x, data, now, after), x + (0.3 - 0.8) * (noise - data))
    torch.testing.assert_close(toward(x, data, now, Level(1.0, 0.0), (noise, level(0.9))), data, msg="no noise, no second order")
    torch.testing.assert_close(noise_in(x, data, now), noise)
    start = Level(0.0, 1.0)
    torch.testing.assert_close(toward(noise, data, start, after), renoised(data, noise, after), msg="from no signal at all")


@given(
    steps=st.integers(1, 60),
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    places=st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3, unique=True),
    back=st.floats(0, 1),
)
def test_a_plan_walks_each_stage_once_and_never_skips_noise(
    steps: int, shares: list[float], places: list[float], back: float
) -> None:
    ends = [*sorted(places)[: len(shares) - 1], 1.0]
    stages, begin = [], 0.0
    for share, until in zip(shares, ends, strict=True):
        stages.append(Stage(steps=share, begin=begin * back, until=until))
        begin = until
    part = Bottleneck(stages=tuple(stages))
    found = nodes(part, steps)
    for number, stage in enumerate(stages):
        own = [node for node in found if node.stage == number]
        assert len(own) == max(1, round(stage.steps * steps))
        assert [node.last for node in own] == [False] * (len(own) - 1) + [True]
        assert own[0].progress == stage.begin and all(node.progress < stage.until for node in own)
        assert all(a.progress < b.progress for a, b in pairwise(own))
    assert [node.stage for node in found] == sorted(node.stage for node in found)


def test_it_is_a_recipe_that_comes_back_from_yaml() -> None:
    part = Bottleneck(noise="kept", stages=(Stage(steps=0.2, until=0.3), Stage(steps=0.5, begin=0.1, shift=2.0)))
    assert from_yaml(Recipe(sampler=part).to_yaml()).sampler == part
    assert parse(Sampler, {"kind": "bottleneck"}, "test") == Bottleneck()
    with pytest.raises(RecipeError, match=r"sampler\.stages\.0\.scales"):
        from_yaml("sampler: {kind: bottleneck, stages: [{steps: 1, scales: 2}]}")


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ((), "empty"),
        ((Stage(steps=1, until=0.5),), "from 0 to 1, got 0 to 0.5"),
        ((Stage(steps=1, scale=0.5),), "full size"),
        ((Stage(steps=0.5, until=0.4), Stage(steps=0.5, begin=0.6)), "noise is skipped"),
    ],
)
def test_plans_that_cannot_be_right_are_refused(stages: tuple[Stage, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Bottleneck(stages=stages)
