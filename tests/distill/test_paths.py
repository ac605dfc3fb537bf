"""Noise paths against each other and against closed forms: exact in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.distill.network.paths import (
    Flow,
    NoisePath,
    VariancePreserving,
    guided,
    path_of,
    scale_from,
    spread,
)
from hasten.errors import ModelError, UsageError

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
PATHS: dict[str, NoisePath] = {
    "flow": Flow(),
    "flux": Flow(1.0),
    "epsilon": VariancePreserving(TABLE),
    "v": VariancePreserving(TABLE, "v_prediction"),
    "sample": VariancePreserving(TABLE, "sample"),
}


def said(path: NoisePath, tau: Tensor, x0: Tensor, z: Tensor) -> Tensor:
    """What a perfect network says of x0 and z."""
    alpha, sigma = (spread(level, x0) for level in path.levels(tau))
    return {"flow": z - x0, "epsilon": z, "v_prediction": alpha * z - sigma * x0, "sample": x0}[path.output]


@pytest.mark.parametrize("name", PATHS)
@settings(deadline=None)
@given(share=st.floats(0.001, 0.98))
def test_a_perfect_network_gives_the_velocity_on_the_circle(name: str, share: float) -> None:
    path, torch_rng = PATHS[name], torch.Generator().manual_seed(0)
    tau = torch.tensor([share * math.pi / 2], dtype=torch.float64)
    x0, z = torch.randn(2, 1, 3, 5, generator=torch_rng, dtype=torch.float64)
    x = tau.cos() * x0 + tau.sin() * z
    p, q = (spread(f, x) for f in path.factors(tau))
    velocity = p * x + q * said(path, tau, x0, z)
    torch.testing.assert_close(velocity, tau.cos() * z - tau.sin() * x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(tau.cos() * x - tau.sin() * velocity, x0, rtol=0, atol=1e-11)
    alpha, sigma = path.levels(tau)
    torch.testing.assert_close(path.scale(tau) * x, alpha * x0 + sigma * z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
@settings(deadline=None)
@given(share=st.floats(0.0, 1.0))
def test_time_and_angle_are_inverse(name: str, share: float) -> None:
    path = PATHS[name]
    end = getattr(path, "end", math.pi / 2)
    tau = torch.tensor([share * end], dtype=torch.float64)
    torch.testing.assert_close(path.angle(path.time(tau)), tau, rtol=0, atol=1e-12)


def test_the_table_is_met_at_its_own_times() -> None:
    path = VariancePreserving(TABLE)
    times = torch.arange(1000)
    alpha, sigma = path.levels(path.angle(times))
    torch.testing.assert_close(alpha.square(), TABLE, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma.square(), 1 - TABLE, rtol=1e-11, atol=0)


def test_flow_conversion_is_sana_sprints() -> None:
    """F = ((1 - 2t) x_rf + (1 - 2t + 2t^2) v) / s with t = sin / (sin + cos), x_rf = s x."""
    tau = torch.linspace(0, math.pi / 2, 101, dtype=torch.float64)
    t = tau.sin() / (tau.sin() + tau.cos())
    s = (t.square() + (1 - t).square()).sqrt()
    p, q = Flow().factors(tau)
    torch.testing.assert_close(p, 1 - 2 * t, rtol=0, atol=1e-15)
    torch.testing.assert_close(q, (1 - 2 * t + 2 * t.square()) / s, rtol=0, atol=1e-15)


def test_a_gaussians_velocity_comes_out_of_each_path() -> None:
    """x0 ~ N(mu, s^2): the posterior means are linear, and so is the velocity on the circle."""
    mu, s, tau = 0.7, 0.3, torch.tensor([0.2, 0.9, 1.4], dtype=torch.float64)
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    c, n = tau.cos(), tau.sin()
    variance = (c * s).square() + n.square()
    x0, z = mu + c * s**2 * (x - c * mu) / variance, n * (x - c * mu) / variance
    for path in PATHS.values():
        p, q = path.factors(tau)
        torch.testing.assert_close(p * x + q * said(path, tau, x0, z), c * z - n * x0, rtol=0, atol=1e-12)


def test_schedulers_say_their_path() -> None:
    import diffusers

    library: Any = diffusers
    assert isinstance(path_of(library.FlowMatchEulerDiscreteScheduler(), 1000.0), Flow)
    assert isinstance(path_of(library.UniPCMultistepScheduler(use_flow_sigmas=True), 1000.0), Flow)
    for kind in ("epsilon", "v_prediction", "sample"):
        path = path_of(library.DDIMScheduler(prediction_type=kind), 1000.0)
        assert path.output == kind
    with pytest.raises(ModelError, match="does not say what its network predicts"):
        path_of(library.EDMEulerScheduler(), 1000.0)


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ModelError, match="must fall"):
        VariancePreserving([0.9, 0.9, 0.5])
    with pytest.raises(ModelError, match="cannot predict noise - data"):
        VariancePreserving([0.9, 0.5], "flow")


@settings(deadline=None)
@given(s=st.floats(0, 9), u=st.floats(-3, 3), c=st.floats(-3, 3))
def test_guidance_conventions_agree(s: float, u: float, c: float) -> None:
    unconditional, conditional = torch.tensor([[u]]).double(), torch.tensor([[c]]).double()
    ours = guided(unconditional, conditional, s)
    torch.testing.assert_close(guided(unconditional, conditional, torch.tensor([s])), ours)
    w = s - 1
    lcm = conditional + w * (conditional - unconditional)
    torch.testing.assert_close(guided(unconditional, conditional, scale_from(w, "c+w(c-u)")), lcm)
    torch.testing.assert_close((1 + w) * conditional - w * unconditional, lcm)
    assert scale_from(s, "u+s(c-u)") == s


def test_unknown_conventions_are_refused() -> None:
    assert scale_from(0.5, "mix") == 2.0
    with pytest.raises(UsageError, match=r"in \[0, 1\)"):
        scale_from(1.0, "mix")
    with pytest.raises(UsageError, match="unknown; allowed"):
        scale_from(3.0, "s")
