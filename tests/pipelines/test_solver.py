"""Solvers and their levels: orders measured on a path that is known, and unmodified pipelines walked by them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

import hasten
from hasten.errors import HastenError, RecipeError, RefusedError, UsageError
from hasten.pipelines.solver import FLOW, VARIANCE_PRESERVING, scheduler_for
from hasten.recipe import Recipe, from_yaml
from hasten.samplers.levels import shifted
from hasten.samplers.solver import Solver
from hasten.scheduler import is_flow
from tests.gaussian import error
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
ORDERS = {("euler", None): 1, ("ddim", None): 1, ("heun", None): 2, ("dpm++", 1): 1, ("dpm++", 2): 2, ("dpm++", 3): 2,
          ("unipc", 1): 1.7, ("unipc", 2): 2.2, ("unipc", 3): 2.2}  # fmt: skip
"""Least order that is to be seen. dpm++ begins with one step of the first order, which leaves an error of h^2 whatever comes
later; unipc's corrector adds an order."""


def falls(host: Any, name: str, order: int | None, stop: float = 0.15) -> float:
    """p in error = h^p between 16 and 64 even steps from all noise to `stop`, the rest of the run left out."""
    found = []
    for n in (16, 64):
        times = (*(1 - (1 - stop) * i / n for i in range(n + 1)), stop * 0.6)
        made = scheduler_for(host, Solver(name=name, order=order, times=times))
        made.set_timesteps(5)
        found.append(error(made, 2 * n if name == "heun" else n))
    return math.log(found[0] / found[1]) / math.log(4)


@pytest.mark.parametrize(
    ("kind", "name", "order"), [(kind, *solver) for kind in HOSTS for solver in ORDERS if (kind, solver[0]) != ("flow", "ddim")]
)
def test_errors_fall_with_the_order(kind: str, name: str, order: int | None) -> None:
    assert falls(HOSTS[kind], name, order) > ORDERS[name, order] - 0.1


def test_pndm_is_of_high_order_and_loses_it_in_its_last_step() -> None:
    found = {}
    for n in (10, 40, 200):
        made = scheduler_for(HOSTS["vp"], Solver(name="pndm"))
        made.set_timesteps(n)
        assert len(made.timesteps) == n + 1, "its second step is taken twice"
        inner = error(made, n * 9 // 10 + 1)
        made.set_timesteps(n)
        found[n] = (inner, error(made))
    assert found[10][0] / found[40][0] > 4**3
    assert found[40][1] / found[200][1] < 5**1.2, "the step to no noise at all is no even one"


def test_ddim_at_chosen_levels_is_ddim() -> None:
    """Even times that DDIM itself can walk, against its own steps."""
    x = torch.linspace(-2, 2, 5).reshape(1, 1, 1, 5)
    ends = []
    for host in (HOSTS["vp"], scheduler_for(HOSTS["vp"], Solver(name="ddim", times=(1.0, 0.8, 0.6, 0.4, 0.2)))):
        host.set_timesteps(5)
        y = x
        for t in host.timesteps:
            y = host.step(torch.sin(3 * y) + t / 1000, t, y, return_dict=False)[0]
        ends.append((host.timesteps.tolist(), y))
    assert ends[0][0] == ends[1][0] == [999, 799, 599, 399, 199]
    assert (ends[0][1] - ends[1][1]).abs().max() < 1e-4


def test_pndm_at_its_own_settings_is_diffusers_pndm() -> None:
    host = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    made = scheduler_for(host, Solver(name="pndm"))
    for scheduler in (host, made):
        scheduler.set_timesteps(7)
    assert made.timesteps.tolist() == host.timesteps.tolist()
    assert made.final_alpha_cumprod == host.final_alpha_cumprod


def test_the_noise_schedule_is_the_hosts_where_it_was_left_at_its_default() -> None:
    for name in VARIANCE_PRESERVING:
        made = scheduler_for(HOSTS["vp"], Solver(name=name))
        assert torch.equal(made.alphas_cumprod, HOSTS["vp"].alphas_cumprod), name


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "heun", "unipc", "dpm++"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras", "exponential", "beta"])
@pytest.mark.parametrize("kind", HOSTS)
def test_every_spacing_stands_in_every_solver(kind: str, name: str, spacing: Any) -> None:
    made = scheduler_for(HOSTS[kind], Solver(name=name, spacing=spacing))
    made.set_timesteps(num_inference_steps=9, device="cpu")
    times = made.timesteps.tolist()
    assert times[0] == pytest.approx(1000 if kind == "flow" else 999, abs=0.01)
    assert len(times) == (17 if name == "heun" else 9) and sorted(times, reverse=True) == times
    assert len(made.sigmas) == (18 if name == "heun" else 10) and made.sigmas[-1] == 0
    other = scheduler_for(HOSTS[kind], Solver(name="euler", spacing=spacing))
    other.set_timesteps(9)
    assert sorted(set(times)) == pytest.approx(sorted(set(other.timesteps.tolist())), rel=1e-5), "the same levels"
    assert math.isfinite(error(made))


@pytest.mark.parametrize("kind", HOSTS)
def test_sigma_belongs_to_the_time_that_the_network_is_told(kind: str) -> None:
    made = scheduler_for(HOSTS[kind], Solver(name="dpm++", times=(1.0, 0.5105, 0.02)))
    made.set_timesteps(30)
    if kind == "flow":
        assert made.sigmas.tolist() == pytest.approx([1, 0.5105, 0.02, 0], abs=1e-5)
        assert made.timesteps.tolist() == pytest.approx([1000, 510.5, 20], abs=2e-3)
    else:
        assert made.timesteps.tolist() == pytest.approx([999, 509.5, 19])
        a, b = (float(((1 - c) / c).sqrt()) for c in made.alphas_cumprod[[509, 510]])
        assert float(made.sigmas[1]) == pytest.approx(math.sqrt(a * b), rel=1e-5)


def test_shift_moves_a_flow() -> None:
    for name in FLOW:
        made = scheduler_for(HOSTS["flow"], Solver(name=name, spacing="trailing", shift=3.0))
        made.set_timesteps(4)
        assert sorted({round(float(s), 4) for s in made.sigmas}, reverse=True) == pytest.approx(
            [shifted(u, 3.0) for u in (1, 0.75, 0.5, 0.25)] + [0], abs=1e-4
        )
        plain = scheduler_for(HOSTS["flow"], Solver(name=name, shift=3.0))
        plain.set_timesteps(4)
        assert float(plain.sigmas[plain.timesteps.tolist().index(plain.timesteps.tolist()[1])]) > 0.75


def test_a_pipelines_own_shift_is_kept_unless_another_is_given() -> None:
    host = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    kept = scheduler_for(host, Solver(name="unipc", spacing="trailing"))
    kept.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=math.log(2.0))
    assert kept.sigmas[1:].tolist() == pytest.approx([shifted(u, 2.0) for u in (0.75, 0.5, 0.25)] + [0], abs=1e-5)
    given = scheduler_for(host, Solver(name="unipc", spacing="trailing", shift=1.0))
    given.set_timesteps(4, mu=math.log(2.0))
    assert given.sigmas[1:].tolist() == pytest.approx([0.75, 0.5, 0.25, 0], abs=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_pipelines_that_tell_sigmas_and_shifts_are_walked_by_every_solver(dynamic: bool) -> None:
    """FLUX tells its scheduler both; a host without dynamic shifting leaves the shift unread."""
    pipe = small_flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=1.7)
    latents(pipe, FLUX_CALL)
    walked = pipe.scheduler.sigmas.tolist()
    for name in FLOW:
        with hasten.accelerate(pipe, Recipe(name="other", sampler=Solver(name=name))):
            assert torch.isfinite(latents(pipe, FLUX_CALL)).all()
            found = sorted(set(pipe.scheduler.sigmas.tolist()), reverse=True)
        assert len(found) == 7
        if name in ("euler", "heun"):
            assert found == pytest.approx(walked, abs=1e-5)


def test_steps_are_a_share_of_chosen_levels_too() -> None:
    made = scheduler_for(HOSTS["vp"], Solver(name="unipc", spacing="karras", steps=0.25))
    made.set_timesteps(20)
    assert len(made.timesteps) == 5


@pytest.mark.parametrize(
    ("host", "solver", "kind", "words"),
    [
        ("flow", Solver(name="pndm"), UsageError, "no form for FlowMatchEuler.*allowed: euler, heun, unipc"),
        ("flow", Solver(name="ddim"), UsageError, "no form"),
        ("vp", Solver(name="unipc", shift=3.0), UsageError, "variance preserving. Set sampler.spacing"),
        ("vp", Solver(name="keep", order=2), UsageError, "DDIMScheduler has one order only"),
        (LCMScheduler(), Solver(name="keep", spacing="karras"), UsageError, "LCMScheduler takes no levels of ours"),
        (PNDMScheduler(), Solver(name="keep", times=(1.0, 0.5)), UsageError, "takes no levels of ours"),
        (DDIMScheduler(prediction_type="sample"), Solver(name="pndm"), RefusedError, "'sample'. Take unipc"),
        (DDIMScheduler(rescale_betas_zero_snr=True), Solver(name="heun"), RefusedError, "rescale_betas_zero_snr"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), Solver(spacing="beta"), RefusedError, "counted another way"),
        (EulerDiscreteScheduler(timestep_type="continuous"), Solver(spacing="beta"), RefusedError, "counted another way"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(host: Any, solver: Solver, kind: type[HastenError], words: str) -> None:
    with pytest.raises(kind, match=words):
        scheduler_for(HOSTS.get(host, host) if isinstance(host, str) else host, solver)


def test_runs_that_cannot_be_are_refused() -> None:
    uneven = scheduler_for(HOSTS["vp"], Solver(name="pndm"))
    with pytest.raises(RefusedError, match="6 even steps of 1000.* 5 and 8"):
        uneven.set_timesteps(6)
    short = scheduler_for(HOSTS["vp"], Solver(times=(1.0, 0.0001)))
    with pytest.raises(UsageError, match="least noise of this model is at 1 / 1000"):
        short.set_timesteps(6)
    with pytest.raises(UsageError, match="at least one step"):
        scheduler_for(HOSTS["vp"], Solver(spacing="beta")).set_timesteps(0)


def test_keep_takes_orders_and_levels() -> None:
    made = scheduler_for(DPMSolverMultistepScheduler(), Solver(name="keep", order=3, spacing="karras"))
    assert type(made) is DPMSolverMultistepScheduler and made.config.solver_order == 3
    host = HOSTS["vp"]
    assert type(scheduler_for(host, Solver(name="keep", times=(1.0, 0.5)))) is DPMSolverMultistepScheduler


# --- unmodified pipelines -------------------------------------------------------------------------

PIPES = {"wan": (small_wan, WAN_CALL), "pixart": (small_pixart, PIXART_CALL), "flux": (small_flux, FLUX_CALL),
         "unet": (small_unet, UNET_CALL)}  # fmt: skip
TIMES = (1.0, 0.9, 0.55, 0.2)


def latents(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = pipe("a seven", **call, output_type="latent", generator=torch.Generator().manual_seed(0))[0]
    return found


@pytest.mark.parametrize("which", PIPES)
def test_pipelines_walk_listed_times_whatever_they_are_asked_for(which: str) -> None:
    build, call = PIPES[which]
    pipe = build()
    plain = latents(pipe, call)
    table = FLOW if is_flow(pipe.scheduler) else VARIANCE_PRESERVING
    for name in (name for name in table if name != "pndm"):
        recipe = Recipe(name="listed times", sampler=Solver(name=name, times=TIMES))
        with hasten.accelerate(pipe, recipe) as run:
            found = latents(pipe, call)
        evaluations = 7 if name == "heun" else 4
        assert run.trace.runs[-1].steps == evaluations and torch.isfinite(found).all()
    assert torch.equal(latents(pipe, call), plain), "restored"


def test_pndm_on_pipelines() -> None:
    pipe = small_unet()
    recipe = Recipe(name="pndm", sampler=Solver(name="pndm"))
    with hasten.accelerate(pipe, recipe) as run:
        assert torch.isfinite(latents(pipe, UNET_CALL)).all()
    assert run.trace.runs[-1].steps == UNET_CALL["num_inference_steps"] + 1
    with pytest.raises(UsageError, match="no form"), hasten.accelerate(small_wan(), recipe):
        pass


def test_a_recipe_with_times_reads_back() -> None:
    recipe = Recipe(name="mine", sampler=Solver(name="dpm++", order=3, times=TIMES))
    assert from_yaml(recipe.to_yaml()) == recipe
    with pytest.raises(RecipeError, match="already says where"):
        recipe.replace({"sampler.steps": 0.5})
