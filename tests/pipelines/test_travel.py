"""Going back keeps the law of the path, and unmodified pipelines do it alike for a seed, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import hasten
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.solver import scheduler_for
from hasten.recipe import Recipe
from hasten.samplers.solver import Solver
from hasten.samplers.travel import TimeTravel
from tests.gaussian import MEAN, SPREAD, alpha_sigma, predict
from tests.hosts import (
    FLUX_CALL,
    PIXART_CALL,
    UNET_CALL,
    WAN_CALL,
    small_flux,
    small_pixart,
    small_unet,
    small_wan,
)

HOSTS = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=1.0),
    "vp": DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
}


def walked(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler, x, float(t)), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("kind", HOSTS)
def test_the_law_of_the_data_is_kept(kind: str) -> None:
    """Many samples of a Gaussian, with the best network there is: fresh noise on the way changes none of its moments."""
    travel = TimeTravel(begin=0.2, end=0.9, back=4, again=2, spacing="trailing")
    made = scheduler_for(HOSTS[kind], travel)
    made.set_timesteps(40)
    assert len(made.timesteps) == len(travel.plan(40)) > 80
    x = torch.randn(6, 1, 40, 200, generator=torch.Generator().manual_seed(0))
    alpha, sigma = alpha_sigma(made, float(made.timesteps[0]))
    start = alpha * (MEAN + SPREAD * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))) + sigma * x
    found = walked(made, start)
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(found.std()) == pytest.approx(SPREAD, rel=0.04)
    plain = scheduler_for(HOSTS[kind], Solver(name="dpm++", spacing="trailing"))
    plain.set_timesteps(40)
    same = torch.corrcoef(torch.stack([found.flatten(), walked(plain, start).flatten()]))[0, 1]
    assert float(same) < 0.9, "other noise makes other pictures"


@pytest.mark.parametrize("kind", HOSTS)
def test_a_walk_without_a_travel_is_the_solver(kind: str) -> None:
    """A window that holds no jump: the same steps, bit for bit."""
    x = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    ends = []
    for solver in (TimeTravel(begin=0.0, end=0.1, back=5), Solver(name="dpm++")):
        made = scheduler_for(HOSTS[kind], solver)
        made.set_timesteps(8)
        ends.append(walked(made, x))
    assert torch.equal(*ends)


def test_rows_do_not_depend_on_their_neighbours_and_a_second_run_is_the_first() -> None:
    made = scheduler_for(HOSTS["vp"], TimeTravel(order=2))
    x = torch.randn(3, 1, 7, 11, generator=torch.Generator().manual_seed(0))
    found = []
    for rows in (x, x, x[1:2]):
        made.set_timesteps(9)
        found.append(walked(made, rows))
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0][1:2], found[2], atol=1e-6)


def test_a_run_from_the_middle_is_refused() -> None:
    made = scheduler_for(HOSTS["vp"], TimeTravel())
    made.set_timesteps(9)
    made.set_begin_index(3)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(RefusedError, match="image to image"):
        made.step(x, made.timesteps[3], x)


def test_reuse_beside_it_is_refused_and_leaves_no_trace() -> None:
    pipe = small_unet()
    own = pipe.scheduler
    with pytest.raises(UsageError, match="goes back to more noise"):
        hasten.accelerate(pipe, "time-travel+easycache")
    assert pipe.scheduler is own and type(own.step).__name__ == "method"


PIPES = {"wan": (small_wan, WAN_CALL), "pixart": (small_pixart, PIXART_CALL), "flux": (small_flux, FLUX_CALL),
         "unet": (small_unet, UNET_CALL)}  # fmt: skip


@pytest.mark.parametrize("which", PIPES)
def test_unmodified_pipelines_travel(which: str) -> None:
    build, call = PIPES[which]
    pipe = build()
    travel = TimeTravel(begin=0.2, end=0.9, back=2, spacing="trailing")

    def latents(seed: int) -> torch.Tensor:
        found: torch.Tensor = pipe("a seven", **call, output_type="latent", generator=torch.Generator().manual_seed(seed))[0]
        return found

    plain = latents(0)
    with hasten.accelerate(pipe, Recipe(name="travel", sampler=travel)) as run:
        found, again, other = latents(0), latents(0), latents(1)
    assert torch.equal(found, again) and not torch.equal(found, other) and torch.isfinite(found).all()
    assert run.trace.runs[-1].steps == len(travel.plan(6)) == 10
    assert run.report().nfe >= 10
    assert torch.equal(latents(0), plain), "restored"
