"""Signals against independent computations: diffusers' own SEA filter, and paths whose bend is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers.hooks import sea_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.caching.signals_spectral import SpectralChange, denoised, wiener_gain
from hasten.caching.signals_stability import Stability, second_difference
from hasten.forecast_adams import adams_bashforth
from hasten.level import Level
from hasten.step import Step
from tests.contract import seeded


def at(sigma: float, index: int = 3) -> Step:
    return Step(index, 10, sigma, 0, None, Level(1 - sigma, sigma, (1.0, -sigma)))


# --- spectral -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("power", [2.0, 3.0])
def test_filter_is_the_one_diffusers_has(sigma: float, power: float) -> None:
    x = seeded(0, 1, 4, 3, 6, 8)  # (B, C, F, H, W); theirs takes (F, H, W, C)
    theirs = sea_cache._apply_sea_filter(x[0].movedim(0, -1), sigma=sigma, power_exp=power).movedim(-1, 0)
    torch.testing.assert_close(denoised(x, Level(1 - sigma, sigma), power)[0], theirs, rtol=1e-4, atol=1e-5)


def test_gain_is_the_best_linear_estimate_of_the_data() -> None:
    """Data of power |f|^-p behind noise: no other gain per frequency has a smaller expected error."""
    frequency, level, power = torch.tensor([0.05, 0.2, 0.5]), Level(0.6, 0.4), 3.0
    best, signal = wiener_gain(frequency, level, power), torch.tensor([0.05, 0.2, 0.5]).pow(-power)

    def error(gain: Tensor) -> Tensor:
        return (1 - gain * level.alpha) ** 2 * signal + gain**2 * level.sigma**2

    for change in (0.98, 1.02):
        assert bool((error(best) < error(best * change)).all())


def test_noise_counts_less_than_content() -> None:
    """The same change of the latents: as a smooth pattern it is content, as a checkerboard it is noise."""
    grid = torch.linspace(0, 2 * math.pi, 9)[:-1]
    smooth = torch.sin(grid).expand(1, 1, 8, 8) * 2**0.5
    board = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    assert float(smooth.norm()) == pytest.approx(float(board.norm()), rel=1e-5)
    changes = []
    for pattern in (smooth, board):
        state, x = SpectralChange().start(), 3 + seeded(0, 1, 1, 8, 8)
        assert state.measure(at(0.95), x) is None
        change = state.measure(at(0.95), x + 0.1 * pattern)
        assert change is not None
        changes.append(float(change))
    assert changes[0] > 5 * changes[1]


def test_a_first_step_of_pure_noise_is_finite() -> None:
    state = SpectralChange().start()
    state.measure(at(1.0), seeded(0, 1, 4, 8, 8))
    change = state.measure(at(0.98), seeded(1, 1, 4, 8, 8))
    assert change is not None and bool(torch.isfinite(change))


def test_without_a_level_nothing_is_known() -> None:
    for signal in (SpectralChange(), Stability()):
        state = signal.start()
        for i in range(6):
            assert state.measure(Step(i, 10, 1 - i / 10), seeded(i, 1, 4, 8, 8)) is None
            state.observe(Step(i, 10, 1 - i / 10), seeded(i, 1, 4, 8, 8), seeded(i + 9, 1, 4, 8, 8))
        assert state.tensors() == []


def test_not_a_number_stays_one() -> None:
    """The gate forgets a history with NaN; a signal must not turn it into a small change meanwhile."""
    for signal in (SpectralChange(), Stability()):
        state, found = signal.start(), None
        for i in range(6):
            bad = torch.full((1, 4, 8, 8), math.nan) if i == 4 else seeded(i, 1, 4, 8, 8)
            found = state.measure(at(1 - i / 10, i), bad)
            if i == 4:
                assert found is not None and math.isnan(float(found))
            state.observe(at(1 - i / 10, i), bad, seeded(i + 9, 1, 4, 8, 8))
        assert found is not None and math.isnan(float(found))


# --- stability ------------------------------------------------------------------------------------


def test_weights_on_equal_steps_are_the_textbooks() -> None:
    found = adams_bashforth([0.6, 0.5, 0.4], 0.4, 0.3)
    assert found == pytest.approx([-0.1 * w / 12 for w in (5, -16, 23)])
    assert second_difference([0.6, 0.5, 0.4]) == pytest.approx([100.0, -200.0, 100.0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.floats(0.02, 0.3), st.floats(0.02, 0.3), st.floats(0.02, 0.3))
def test_integral_and_bend_of_a_parabola_are_exact(c: list[float], a: float, b: float, d: float) -> None:
    nodes = [1.0, 1.0 - a, 1.0 - a - b]
    start, end = nodes[-1], nodes[-1] - d
    values = [c[0] + c[1] * t + c[2] * t * t for t in nodes]
    area = sum(w * v for w, v in zip(adams_bashforth(nodes, start, end), values, strict=True))
    exact = [c[0] * t + c[1] * t * t / 2 + c[2] * t**3 / 3 for t in (start, end)]
    assert area == pytest.approx(exact[1] - exact[0], abs=1e-8)
    bend = sum(w * v for w, v in zip(second_difference(nodes), values, strict=True))
    assert bend == pytest.approx(2 * c[2], abs=1e-6)


def rotating(first: float, second: float, angle: float) -> tuple[Step, Tensor, Tensor]:
    """Variance-preserving v-prediction whose velocity is first * angle + second * angle^2 along one direction."""
    level = Level(math.cos(angle), math.sin(angle), (math.cos(angle), -math.sin(angle)))
    direction = seeded(0, 1, 16)
    return Step(0, 20, angle * 2 / math.pi, 0, None, level), direction, direction * (first * angle + second * angle**2)


@pytest.mark.parametrize(("first", "second", "stable"), [(1.0, 1.0, True), (-3.0, 1.0, False)])
def test_sign_tells_a_path_that_straightens_from_one_that_bends(first: float, second: float, stable: bool) -> None:
    """v' = first + 2 second * angle: as the angle falls from 1.2 to 0.6 |v'| shrinks in one case and grows in the other."""
    state, found = Stability().start(), None
    x, angles = seeded(1, 1, 16), [1.2, 1.1, 0.95, 0.85, 0.7, 0.6]
    for now, then in itertools.pairwise(angles):
        step, _, v = rotating(first, second, now)
        found = state.measure(step, x)
        state.observe(step, x, v)
        x = x + (then - now) * v  # Euler's method on the circle
    assert found is not None and float(found) == pytest.approx(-1.0 if stable else 1.0, abs=1e-3)


def test_flow_and_rotation_see_the_same_path() -> None:
    """A flow's latents, divided by their norm on the circle, are the same trajectory, so the criterion is the same."""
    data, noise = seeded(0, 1, 16).double(), seeded(1, 1, 16).double()
    found: list[float] = []
    for flow in (True, False):
        state, value = Stability().start(), None
        for i, angle in enumerate((1.3, 1.1, 1.0, 0.7, 0.6)):
            bent = data + 0.3 * math.sin(3 * angle) * seeded(2, 1, 16).double()
            alpha, sigma = math.cos(angle), math.sin(angle)
            total = alpha + sigma if flow else 1.0
            level = Level(alpha / total, sigma / total, (1.0, -sigma / total) if flow else (alpha, -sigma))
            x = (alpha * bent + sigma * noise) / total
            y = noise - bent if flow else alpha * noise - sigma * bent
            value = state.measure(Step(i, 5, angle, 0, None, level), x)
            state.observe(Step(i, 5, angle, 0, None, level), x, y)
        assert value is not None
        found.append(float(value))
    assert found[0] == pytest.approx(found[1], abs=1e-4) and abs(found[0]) > 0.05


def test_a_repeated_time_keeps_the_newer_value() -> None:
    state = Stability().start()
    for i, sigma in enumerate((0.9, 0.8, 0.8, 0.6, 0.6)):
        state.measure(at(sigma), seeded(i, 1, 8))
        state.observe(at(sigma), seeded(i, 1, 8), seeded(i + 9, 1, 8))
    found = state.measure(at(0.5), seeded(7, 1, 8))
    assert found is not None and bool(torch.isfinite(found))
