"""The chain of residual shifting: its schedule, its posterior, and a Gaussian problem that it must solve."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import UsageError
from hasten.samplers.residual_shift import ResidualShift

CHAINS = st.builds(
    ResidualShift, steps=st.integers(2, 40), power=st.floats(0.1, 3), kappa=st.floats(0.1, 4), last=st.floats(0.5, 1)
)


@given(chain=CHAINS)
def test_eta_rises_from_nothing_to_its_last_value(chain: ResidualShift) -> None:
    eta = chain.eta
    assert len(eta) == chain.steps + 1 and eta[0] == 0
    assert all(a < b for a, b in zip(eta, eta[1:], strict=False))  # noqa: RUF007
    assert eta[1] == pytest.approx(chain.first) and eta[-1] == pytest.approx(chain.last)
    assert chain.spread(1) <= 0.04 * (1 + 1e-9)


def test_the_papers_schedule() -> None:
    """Equation 10 in its own words: b0^beta_t, b0 = exp(log(eta_T / eta_1) / (2 (T - 1))), beta_t = ((t-1)/(T-1))^p (T-1)."""
    chain = ResidualShift()
    b0 = math.exp(math.log(chain.last / chain.first) / (2 * 14))
    for t in range(1, 16):
        beta = ((t - 1) / 14) ** 0.3 * 14
        assert math.sqrt(chain.eta[t]) == pytest.approx(math.sqrt(chain.first) * b0**beta)
    assert chain.eta[1] == pytest.approx(0.0004)


@given(chain=CHAINS, data=st.data())
def test_going_back_is_bayes_rule(chain: ResidualShift, data: st.DataObject) -> None:
    """By precisions: x_s = x0 + eta_s e + noise, x_t = x_s + alpha e + noise, e = y - x0; in float64."""
    t = data.draw(st.integers(1, chain.steps))
    s = data.draw(st.integers(0, t - 1))
    a, b, d = chain.back(t, s)
    x0, y, x_t = 0.3, -0.8, 1.1
    residual, alpha = y - x0, chain.eta[t] - chain.eta[s]
    if s == 0:
        assert (a, b, d) == (0, 1, 0), "no noise left: the clean picture itself"
        return
    before, after = chain.kappa**2 * chain.eta[s], chain.kappa**2 * alpha
    variance = 1 / (1 / before + 1 / after)
    mean = variance * ((x0 + chain.eta[s] * residual) / before + (x_t - alpha * residual) / after)
    assert a * x_t + b * x0 == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert d**2 == pytest.approx(variance, rel=1e-9)


@given(chain=CHAINS, data=st.data())
def test_the_marginal_law_of_a_state_is_kept(chain: ResidualShift, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, chain.steps))
    s = data.draw(st.integers(0, t - 1))
    a, b, d = chain.back(t, s)
    x0, y = 0.3, -0.8
    assert a * (x0 + chain.eta[t] * (y - x0)) + b * x0 == pytest.approx(x0 + chain.eta[s] * (y - x0), abs=1e-12)
    assert (a * chain.spread(t)) ** 2 + d**2 == pytest.approx(chain.spread(s) ** 2, rel=1e-9, abs=1e-15)


def solved(chain: ResidualShift, steps: int, y: float, deviation: float, rough: float) -> tuple[float, float]:
    """Mean and variance of the restored x0, for x0 ~ N(0, deviation^2), y = x0 + N(0, rough^2) and the best network.

    All is Gaussian: x_t and x0 given y have a joint law, so that E[x0 | x_t, y] is linear in x_t, and so is each step.
    """
    gain = deviation**2 / (deviation**2 + rough**2)
    center, width = gain * y, deviation**2 * rough**2 / (deviation**2 + rough**2)
    times = chain.times(steps)
    mean, variance = y, chain.spread(times[0]) ** 2  # the chain begins at y, not at x_T's own law
    for t, s in zip(times, times[1:], strict=False):  # noqa: RUF007
        eta = chain.eta[t]
        spread = (1 - eta) ** 2 * width + chain.spread(t) ** 2
        slope = (1 - eta) * width / spread
        a, b, d = chain.back(t, s)
        own = (1 - eta) * center + eta * y
        mean = a * mean + b * (center + slope * (mean - own))
        variance = (a + b * slope) ** 2 * variance + d**2
    return mean, variance


def test_a_gaussian_problem_is_solved_and_the_longer_the_chain_the_better() -> None:
    """The restored picture follows the posterior of x0 given y; one step gives its mean and no variance."""
    y, deviation, rough = 1.4, 1.0, 0.6
    center, width = y / 1.36, 0.36 / 1.36
    errors = []
    for steps in (25, 100, 400):
        mean, variance = solved(ResidualShift(steps=steps, power=1.0), steps, y, deviation, rough)
        errors.append(abs(variance - width) / width)
        assert mean == pytest.approx(center, abs=1e-3)
    floor = ResidualShift().spread(1) ** 2 / width  # the last step takes the noise of x_1 for none
    assert (errors[1] - floor) / (errors[2] - floor) == pytest.approx(4, rel=0.15), "of first order in the steps"
    assert errors[0] > errors[1] and errors[2] < 0.02
    mean, variance = solved(ResidualShift(), 1, y, deviation, rough)
    assert mean == pytest.approx(center, abs=1e-3) and variance < 1e-3 * width


def test_the_states_of_real_tensors() -> None:
    g = torch.Generator().manual_seed(0)
    x0, y, noise = (torch.randn(2, 1, 3, 5, generator=g, dtype=torch.float64) for _ in range(3))
    chain = ResidualShift(last=1.0)
    torch.testing.assert_close(chain.forward(x0, y, noise, 15), y + 2 * noise)
    torch.testing.assert_close(chain.forward(x0, y, noise, 0), x0)


def test_steps_are_left_out_evenly() -> None:
    chain = ResidualShift()
    assert chain.times(15) == tuple(range(15, -1, -1))
    assert chain.times(4) == (15, 11, 8, 4, 0)
    assert chain.times(1) == (15, 0)
    for steps in (0, 16):
        with pytest.raises(UsageError, match="ask for 1 to 15"):
            chain.times(steps)


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"power": 0.0}, {"kappa": 0.0}, {"last": 1.5}, {"last": 0.0001}])
def test_what_makes_no_chain_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="Residual shifting needs"):
        ResidualShift(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Going back"):
        ResidualShift().back(3, 3)
