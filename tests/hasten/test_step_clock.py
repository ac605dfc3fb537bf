"""The clock on real diffusers schedulers."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from hasten.clock import Clock
from hasten.scheduler import solver_times, solver_weights
from hasten.step import Step
from tests.contract import seeded

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "flow unipc": ("UniPCMultistepScheduler", FLOW),
    "ddim leading": ("DDIMScheduler", {**SD, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
    "ddim trailing": ("DDIMScheduler", {**SD, "clip_sample": False, "timestep_spacing": "trailing"}),
    "euler": ("EulerDiscreteScheduler", SD),
    "euler karras": ("EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True}),
    "euler svd": (
        "EulerDiscreteScheduler",
        {
            **SD,
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ),
    "dpm++": ("DPMSolverMultistepScheduler", SD),
    "dpm++ karras": ("DPMSolverMultistepScheduler", {**SD, "use_karras_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", SD),
    "pndm": ("PNDMScheduler", {**SD, "skip_prk_steps": True}),
}
FIRST_ORDER = ("flow euler", "ddim leading", "euler", "euler karras")


def solver(name: str, num: int = 10) -> Any:
    kind, config = SOLVERS[name]
    made = getattr(diffusers, kind)(**config)
    made.set_timesteps(num)
    return made


def walk(clock: Clock, scheduler: Any, branches: int = 1, *, num: int = 10, fresh: bool = False) -> list[Step]:
    """A loop over `scheduler`; fresh: the conditioning is built anew in each step."""
    scheduler.set_timesteps(num)
    texts = [seeded(i, 1, 3, 4) for i in range(branches)]
    x, seen = seeded(9, 1, 4, 4, 4), []
    for time in scheduler.timesteps:
        x = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        for text in texts:
            entered = clock.enter("net", text.clone() if fresh else text, None, time)
            assert entered is not None and entered[1]
            seen.append(entered[0])
        x = scheduler.step(0.1 * x, time, x, return_dict=False)[0]
    return seen


@pytest.mark.parametrize("name", SOLVERS)
class TestEverySolver:
    def test_index_total_and_time(self, name: str) -> None:
        scheduler, clock, runs = solver(name), Clock(), []
        clock.on_end.append(lambda: runs.append(clock.run))
        clock.follow(scheduler)
        seen = walk(clock, scheduler, branches=2)
        total = len(scheduler.timesteps)
        assert [step.index for step in seen] == [i for i in range(total) for _ in range(2)]
        assert {step.total for step in seen} == {total} and [step.branch for step in seen] == [0, 1] * total
        assert all(0 <= step.time <= 1 for step in seen)
        assert all(a.time >= b.time for a, b in zip(seen[::2], seen[2::2], strict=False))
        assert len({step.time for step in seen}) >= 9 and not clock.running and runs == [0]
        assert seen[-1].last and not seen[0].last

    def test_signatures_are_unchanged_and_release_restores(self, name: str) -> None:
        scheduler, clock = solver(name), Clock()
        before = {method: inspect.signature(getattr(scheduler, method)) for method in ("set_timesteps", "step")}
        keys = set(vars(scheduler))
        clock.follow(scheduler)
        assert before == {method: inspect.signature(getattr(scheduler, method)) for method in before}
        walk(clock, scheduler)
        clock.release()
        assert not {"step", "set_timesteps"} & set(vars(scheduler)) and keys <= set(vars(scheduler))

    def test_followed_scheduler_gives_the_same_path(self, name: str) -> None:
        def path(scheduler: Any) -> Tensor:
            x = seeded(0, 1, 4, 4, 4)
            for time in scheduler.timesteps:
                x = scheduler.step(0.1 * x, time, x, return_dict=False)[0]
            return x

        followed, clock = solver(name), Clock()
        clock.follow(followed)
        assert torch.equal(path(followed), path(solver(name)))

    def test_deep_copy_is_independent(self, name: str) -> None:
        scheduler, clock = solver(name), Clock()
        clock.follow(scheduler)
        twin, ticks = copy.deepcopy(scheduler), []
        clock.on_tick.append(ticks.append)
        twin.set_timesteps(4)
        assert len(scheduler.timesteps) != len(twin.timesteps)
        clock.enter("net")
        twin.step(seeded(0, 1, 4), twin.timesteps[0], seeded(1, 1, 4))
        assert not ticks and clock.step is not None and clock.step.index == 0

    def test_rebuilt_conditioning_keeps_its_number(self, name: str) -> None:
        scheduler, clock = solver(name), Clock()
        clock.follow(scheduler)
        assert [step.branch for step in walk(clock, scheduler, 3, fresh=True)][-3:] == [0, 1, 2]


def influence(scheduler: Any) -> list[float]:
    """How far the next latents move per unit of output, measured; in DDIM's scaled latents x / sqrt(alpha)."""
    found, x = [], seeded(0, 1, 4, 4, 4, dtype=torch.float64)
    for i, time in enumerate(scheduler.timesteps):
        output = seeded(i, 1, 4, 4, 4, dtype=torch.float64)
        both = copy.deepcopy(scheduler).step(output + 1, time, x, return_dict=False)[0]
        moved = scheduler.step(output, time, x, return_dict=False)[0]
        level = 1.0
        if "DDIM" in type(scheduler).__name__:
            before = int(time) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
            level = float(scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod)
        found.append(float((both - moved).double().mean()) / level**0.5)
        x = moved.double()
    return found


@pytest.mark.parametrize("num", [5, 7, 10, 25])
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_weights_are_what_the_solver_does(name: str, num: int) -> None:
    weights = solver_weights(solver(name, num))
    assert weights == pytest.approx(influence(solver(name, num)), rel=2e-3, abs=1e-5)


def test_weights_of_ddim_with_trailing_steps() -> None:
    assert solver_weights(solver("ddim trailing", 7)) == pytest.approx(influence(solver("ddim trailing", 7)), rel=2e-3)


@pytest.mark.parametrize("name", ["flow heun", "flow unipc", "dpm++", "heun", "pndm", "euler svd"])
def test_no_weight_where_the_solver_is_not_linear_in_one_output(name: str) -> None:
    assert solver_weights(solver(name)) == [None] * len(solver(name).timesteps)


def test_flow_time_is_sigma() -> None:
    scheduler = solver("flow euler")
    assert solver_times(scheduler) == pytest.approx(scheduler.sigmas[:-1].tolist())


@pytest.mark.parametrize("name", ["flow euler", "dpm++", "euler"])
def test_image_to_image_starts_in_the_middle(name: str) -> None:
    scheduler, clock = solver(name), Clock()
    clock.follow(scheduler)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    for time in scheduler.timesteps[4:]:
        entered = clock.enter("net", None, None, time)
        assert entered is not None
        scheduler.step(seeded(0, 1, 4), time, seeded(1, 1, 4))
    step = entered[0]
    assert (step.index, step.total) == (5, 6) and len(clock.run_times) == 6 and not clock.running


@pytest.mark.parametrize("of", [lambda t: t / 1000, lambda t: 1 - t / 1000])
def test_scaled_times_start_at_the_beginning(of: Any) -> None:
    """Flows end at timestep 1: a network that is first given 1000 / 1000 is not at the end of the run."""
    scheduler, clock = solver("flow euler", 8), Clock()
    clock.follow(scheduler)
    scheduler.set_timesteps(8)
    assert float(scheduler.timesteps[-1]) > 0
    scheduler.timesteps[-1] = of(1000.0)
    entered = clock.enter("net", None, None, of(scheduler.timesteps[:1]))
    assert entered is not None and (entered[0].index, entered[0].total) == (0, 8)


def test_calls_of_others_are_not_trusted() -> None:
    scheduler, clock = solver("flow euler"), Clock()
    assert clock.enter("net") is None
    clock.follow(scheduler)
    mine, foreign, trusted = seeded(0, 1, 3, 4), seeded(1, 1, 3, 4), []
    for index, time in enumerate(scheduler.timesteps):
        calls = [mine, foreign] if index == 3 else [mine]
        entered = [clock.enter("net", text, None, time) for text in calls]
        trusted += [entry[1] for entry in entered if entry is not None]
        scheduler.step(seeded(0, 1, 4), time, seeded(1, 1, 4))
    assert trusted == [True] * 4 + [False] + [True] * 6
    assert clock.enter("net", mine) is None


def test_prompt_swapped_in_place_is_another_branch() -> None:
    scheduler, clock, text = solver("flow euler"), Clock(), seeded(0, 1, 3, 4)
    clock.follow(scheduler)
    seen = []
    for index, time in enumerate(scheduler.timesteps):
        if index == 5:
            text.copy_(seeded(1, 1, 3, 4))
        entered = clock.enter("net", text, None, time)
        assert entered is not None
        seen.append((entered[0].branch, entered[1]))
        scheduler.step(seeded(0, 1, 4), time, seeded(1, 1, 4))
    assert seen == [(0, True)] * 5 + [(1, False)] + [(1, True)] * 4


def test_other_thread_is_not_followed() -> None:
    scheduler, clock, found = solver("flow euler"), Clock(), []
    clock.follow(scheduler)
    assert clock.enter("net") is not None
    thread = threading.Thread(target=lambda: found.append(clock.enter("net")))
    thread.start()
    thread.join()
    assert found == [None]
