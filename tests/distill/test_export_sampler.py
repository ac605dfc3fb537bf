"""A student's calls as a scheduler of diffusers: the same pictures in plain pipelines as in few_steps.sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.distill.export.sampler import few_calls, scheduler_for, told_guidance
from hasten.distill.network.few_steps import FewSteps, sample
from hasten.distill.network.host_call import HostCall, learn
from hasten.distill.network.paths import Flow, VariancePreserving
from hasten.distill.network.roles import Role
from hasten.errors import RecipeError, RefusedError, UsageError
from hasten.pipelines.seams.few_calls import arguments
from hasten.samplers.few_calls import FewCalls
from tests.hosts import FLUX_CALL, PIXART_CALL, WAN_CALL, small_flux, small_pixart, small_wan

HOSTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan": (small_wan, WAN_CALL), "flux": (small_flux, FLUX_CALL), "pixart": (small_pixart, PIXART_CALL),
}  # fmt: skip
PROMPT = "a seven moving left"


def both(which: str, how: Any, calls: int, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """Latents by few_steps.sample, and by the plain pipeline with our scheduler, from one noise and one generator's noise."""
    make, call = HOSTS[which]
    pipe = make()
    host, condition = learn(pipe, [PROMPT], **call)
    steps = FewSteps.even(calls, host.path, how, shift=shift)
    z = torch.randn(1, *host.shape, generator=torch.Generator().manual_seed(4))
    ours = few_steps(host, condition, steps, z)
    part = few_calls(steps, host.path, told_guidance(pipe, call))
    pipe.scheduler = scheduler_for(part, pipe.scheduler)
    pipe.scheduler.step = drawing_from(pipe.scheduler.step, torch.Generator().manual_seed(5))
    given = call | arguments(type(pipe), part)
    with torch.no_grad():
        theirs = pipe(PROMPT, latents=z.clone(), output_type="latent", **given)[0]
    return ours, torch.as_tensor(theirs)


def few_steps(host: HostCall, condition: Any, steps: FewSteps, z: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return sample(
            Role("student", host, None, (), False), z, condition, steps, lambda _, x: torch.randn(x.shape, generator=generator)
        )


def drawing_from(step: Any, generator: torch.Generator) -> Any:
    """The scheduler's step with this generator, if it takes one."""

    def drawn(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("generator", None)
        try:
            return step(*args, generator=generator, **kwargs)
        except TypeError:
            return step(*args, **kwargs)

    return drawn


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("how", ["ode", "consistency"])
@pytest.mark.parametrize("which", HOSTS)
def test_plain_diffusers_makes_the_students_picture(which: str, how: Any, calls: int) -> None:
    ours, theirs = both(which, how, calls, shift=2.0 if which == "flux" else 1.0)
    # float32 of another order of operations, over three evaluations of a random network
    torch.testing.assert_close(theirs, ours, rtol=2e-4, atol=2e-4 * float(ours.abs().max()))


def test_pictures_of_other_levels_are_told_apart() -> None:
    """The comparison above would see a wrong level."""
    (ours, _), (other, _) = both("wan", "ode", 3), both("wan", "ode", 3, shift=1.05)
    assert float((ours - other).abs().max()) > 5e-3 * float(ours.abs().max())


def test_levels_are_the_students() -> None:
    flow = few_calls(FewSteps.even(4, Flow(1.0), shift=3.0), Flow(1.0))
    assert flow.sigmas == pytest.approx((1.0, 9 / 10, 3 / 4, 1 / 2), abs=1e-12)
    table = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)
    path = VariancePreserving(table)
    assert few_calls(FewSteps.even(4, path), path).timesteps == (999, 749, 500, 250)


def test_what_no_scheduler_does_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"first call is at sigma = 0\.\d+, and pipelines .* start at 1"):
        few_calls(FewSteps((1.2, 0.3)), Flow())
    path = VariancePreserving(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64))
    between = float(path.angle(torch.tensor([500.4]).double()))
    with pytest.raises(RefusedError, match=r"asked at time 500\.40"):
        few_calls(FewSteps((path.end, between)), path)
    first = float(path.angle(torch.tensor([0.0]).double()))
    with pytest.raises(RefusedError, match="time 0 for finished data"):
        few_calls(FewSteps((path.end, first)), path)
    assert few_calls(FewSteps((path.end, first), "ode"), path).timesteps == (999, 0)
    with pytest.raises(RefusedError, match="flow map"):
        few_calls(FewSteps((math.pi / 2,), "map"), Flow())


def test_a_model_of_the_other_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="sampler.sigmas are for the other kind .* takes timesteps"):
        scheduler_for(FewCalls(sigmas=(1.0, 0.5)), small_pixart().scheduler)
    with pytest.raises(UsageError, match="sampler.timesteps are for the other kind"):
        scheduler_for(FewCalls(timesteps=(999,)), small_wan().scheduler)


@pytest.mark.parametrize("wrong", [{}, {"sigmas": (0.9,)}, {"sigmas": (1.0, 0.0)}, {"timesteps": (5, 5)},
                                   {"sigmas": (1.0,), "timesteps": (999,)}])  # fmt: skip
def test_wrong_levels_are_refused(wrong: Any) -> None:
    with pytest.raises((RecipeError, ValueError), match="sampler"):
        FewCalls(**wrong)


def test_noise_follows_from_the_start_where_no_generator_is_given() -> None:
    pipe = small_wan()
    scheduler = scheduler_for(FewCalls(sigmas=(1.0, 0.5, 0.2)), pipe.scheduler)

    def run(x: Tensor) -> Tensor:
        scheduler.set_timesteps(50, device="cpu")
        assert len(scheduler.timesteps) == 3
        for t in scheduler.timesteps:
            x = scheduler.step(-x, t, x)[0]
        return x

    torch.manual_seed(0)
    x = torch.randn(1, 16, 2, 4, 4)
    one = run(x)
    torch.manual_seed(9)
    assert torch.equal(run(x), one)
    assert not torch.equal(run(x + 1), one)
    assert torch.equal(run(torch.cat([x + 1, x]))[1:], one)  # whatever its neighbours are
    scheduler.set_timesteps(3, device="cpu")
    two = torch.cat([x, x + 1])
    noise = scheduler.step(two, scheduler.timesteps[0], two)[0]  # x0 = 0: what is left is the noise
    assert not torch.equal(noise[0], noise[1])
