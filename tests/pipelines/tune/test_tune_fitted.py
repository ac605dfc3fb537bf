"""Solvers that are fitted to plain runs: they end nearer, and what cannot be fitted is left alone."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from hasten.pipelines.bench.shots import Sample, shoot
from hasten.pipelines.tune.few import Few, start
from hasten.pipelines.tune.fitted import Fitting, levels_of
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.space import Space, first_guesses, neighbours
from hasten.pipelines.tune.trials import Bench
from hasten.recipe import Recipe, from_yaml
from hasten.samplers.guidance import ListedGuidance
from hasten.samplers.solver import Solver
from tests.hosts import FLUX_CALL, UNET_CALL, small_flux, small_unet

SAMPLES = [Sample("a seven", 0), Sample("a one", 1)]
GUIDANCE = ListedGuidance(at=(0.0, 0.5), order=0)


@pytest.mark.parametrize(("make", "call"), [(small_unet, UNET_CALL), (small_flux, FLUX_CALL)], ids=["unet", "flux"])
def test_a_fitted_solver_ends_nearer_the_plain_run(make, call) -> None:  # type: ignore[no-untyped-def]
    bench = Bench(make(), {**call, "num_inference_steps": 12}, SAMPLES)
    fitting = Fitting.on(bench, lambda: math.inf)
    assert fitting is not None
    first = start(fitting.levels, 3, "euler" if make is small_flux else "ddim")
    before = float(fitting._residual(first).square().mean())
    recipe = fitting.fit(3, None)
    assert fitting.known[3, None][1] < before and fitting.fit(3, None) == recipe, "and it is fitted once"
    error = [bench.measure("x", each).outcomes for each in (first.recipe, recipe)]
    assert max(o.latent_error or 0 for o in error[1]) < max(o.latent_error or 0 for o in error[0])
    assert from_yaml(recipe.to_yaml()).sampler == recipe.sampler


def test_how_much_a_held_difference_counts_is_fitted_too() -> None:
    bench = Bench(small_unet(), {**UNET_CALL, "num_inference_steps": 12}, SAMPLES)
    fitting = Fitting.on(bench, lambda: math.inf)
    assert fitting is not None
    first = Few(start(fitting.levels, 3, "ddim").solver, GUIDANCE).told
    assert isinstance(first.guidance, ListedGuidance) and first.guidance.factors == (1.0, 1.0, 1.0)
    recipe = fitting.fit(3, GUIDANCE)
    found = recipe.guidance
    assert isinstance(found, ListedGuidance) and found.factors[:2] == (1.0, 1.0) and found.factors[2] != 1.0, "the second step knows both"
    assert fitting.known[3, GUIDANCE][1] < float(fitting._residual(first).square().mean())
    assert from_yaml(recipe.to_yaml()).guidance == found


def test_runs_of_a_fit_are_not_decoded() -> None:
    pipe, decoded = small_unet(), []
    shot = shoot(pipe, SAMPLES[0], UNET_CALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda *args, **kwargs: decoded.append(args))
        latents = shoot(pipe, SAMPLES[0], UNET_CALL, decoded=False).latents
    assert latents is not None and shot.latents is not None and torch.equal(latents, shot.latents) and not decoded


def test_a_fit_without_time_is_the_known_rule() -> None:
    bench = Bench(small_unet(), {**UNET_CALL, "num_inference_steps": 12}, SAMPLES[:1])
    fitting = Fitting.on(bench, lambda: 0.0)
    assert fitting is not None and fitting.fit(3, GUIDANCE) == start(fitting.levels, 3, "ddim", GUIDANCE).rounded.recipe


def test_of_many_samples_a_third_is_watched_and_not_fitted_on() -> None:
    """On the watched ones it is better than what it began with, and that is the error it is known by."""
    bench = Bench(small_unet(), {**UNET_CALL, "num_inference_steps": 12}, [Sample("a seven", seed) for seed in range(6)])
    fitting = Fitting.on(bench, lambda: math.inf)
    assert fitting is not None and fitting.watched == [2, 5]
    begun = start(fitting.levels, 3, "ddim")
    before = float(fitting._residual(begun, [2, 5]).square().mean())
    fitting.fit(3, None)
    after = float(fitting._residual(fitting.known[3, None][0], [2, 5]).square().mean())
    assert after < before and after == pytest.approx(fitting.known[3, None][1], rel=1e-3)


def test_it_starts_as_adams_bashforth_on_uneven_levels() -> None:
    few = start([1.0, 0.8, 0.5, 0.4], 4, "euler")
    solver = few.solver
    assert solver.times == (1.0, 0.8, 0.5, 0.4)
    assert solver.weights == ((1.0,), pytest.approx((1.75, -0.75)), pytest.approx((7 / 6, -1 / 6, 0)), pytest.approx((3.0, -2.0, 0)))
    assert few.size == 3 + 1 + 2 + 3 + 3
    held = start([1.0, 0.8, 0.5, 0.4], 4, "euler", ListedGuidance(at=(0.0, 1.0), order=0))
    assert held.size == few.size + 2, "the steps in the middle have no second branch"


def test_a_move_keeps_levels_falling() -> None:
    few = start([1.0, 0.75, 0.5, 0.25], 4, "euler")
    assert few.moved([0.0] * few.size) == few
    assert few.moved([9.0, 0, 0, *[0.0] * 9]) is None, "by at most half, in log, which is above 1 here"
    changed = few.moved([-0.1, *[0.0] * 10, 0.25])
    assert changed is not None and changed.solver.times is not None and changed.solver.weights is not None
    assert changed.solver.times[1] == pytest.approx(0.75 * math.exp(-0.1)) and changed.solver.weights[-1][-1] == 0.25
    assert few.moved([math.nan] * few.size) is None


def test_levels_are_those_of_the_last_run() -> None:
    flow, ddim, late = FlowMatchEulerDiscreteScheduler(shift=3.0), DDIMScheduler(), DPMSolverMultistepScheduler()
    for scheduler in (flow, ddim, late):
        scheduler.set_timesteps(10)
    assert levels_of(flow) == (1.0, *[float(s) for s in flow.sigmas[1:-1]])
    assert levels_of(ddim)[:2] == (1.0, pytest.approx(0.801)) and len(levels_of(ddim)) == 10
    ddim.timesteps = ddim.timesteps[5:]
    assert levels_of(ddim) == (), "a run that began in the middle says nothing of a whole one"


def test_downhill_is_a_step_or_a_branch_less() -> None:
    space = Space(20, True, fit=lambda num, guidance: Recipe(sampler=Solver(name="ddim")))
    assert "fitted" in space.families and any(guess["family"] == "fitted" for guess in first_guesses(space, 0.1))
    found = neighbours(space, {"family": "fitted", "steps": 6, "unguided": 0})
    assert found == [
        {"family": "fitted", "steps": 5, "unguided": 0}, {"family": "fitted", "steps": 6, "unguided": 1},
        {"family": "fitted", "steps": 7, "unguided": 3},
    ]  # fmt: skip
    assert neighbours(space, {"family": "preset", "preset": "auto"}) == []
    assert neighbours(Space(20, False), {"family": "solver", "solver": "unipc", "steps": 3, "order": 2}) == [], "three are the fewest"
    made = space.recipe({"family": "solver", "solver": "unipc", "steps": 6, "order": 2, "unguided": 2})
    assert made.guidance == ListedGuidance(at=(0.0, 0.2, 0.4, 0.8), order=0), "not the last, and not the second before it"


def test_of_many_samples_the_worst_does_not_count() -> None:
    from tests.pipelines.tune.test_tune_space import run

    few, many = run(2, 31, 29).measured, run(2, *[31] * 5, 29).measured
    assert few.counted(Goal("psnr", 30)) == 29 and not few.nearly(Goal("psnr", 30))
    assert many.counted(Goal("psnr", 30)) == 31 and many.nearly(Goal("psnr", 30))
