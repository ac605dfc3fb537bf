"""What changes during a run of an accelerated pipeline: an interrupt, prompts, guidance, solvers, networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler

import hasten
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every, Spread
from hasten.recipe import Recipe
from tests import hosts
from tests.pipelines.accelerated import ALTERNATE, Host, computed

pytestmark = pytest.mark.filterwarnings("ignore:hasten")


def test_interrupt_restores_and_next_run_is_clean() -> None:
    host = Host("wan")
    before, marks = host(), host.fingerprint()

    def stop(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 2
        return values

    with hasten.accelerate(host.pipe, ALTERNATE) as run:
        clean = host()
        host(callback_on_step_end=stop)
        assert not run.trace.runs[-1].finished
        assert torch.equal(host(), clean)
    assert host.fingerprint() == marks and torch.equal(host(), before)


def test_changed_prompt_between_runs_is_not_answered_from_the_last() -> None:
    host = Host("wan")
    with hasten.accelerate(host.pipe, ALTERNATE):
        alone = host(prompt="two cat")
    with hasten.accelerate(host.pipe, ALTERNATE):
        host()
        assert torch.equal(host(prompt="two cat"), alone)


def test_changed_prompt_in_the_middle_is_computed_afresh() -> None:
    """A step whose outputs are all computed must equal the plain step, whatever was cached for the old prompt."""
    host = Host("wan")
    other = host.pipe.encode_prompt("two cat", do_classifier_free_guidance=False)[0]

    def swap(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            values["prompt_embeds"] = other
        return values

    wanted = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    plain = host(**wanted)
    with hasten.accelerate(host.pipe, "plain"):
        assert torch.equal(host(**wanted), plain)
    with hasten.accelerate(host.pipe, Recipe(reuse=NetworkReuse(rule=Every(interval=3, warmup=3)))) as run:
        host(**wanted)
    new = max(event.branch for event in run.trace.events)
    first = next(event for event in run.trace.events if event.branch == new)
    assert (new, first.step, first.action) == (2, 3, "compute")


def test_guidance_switched_off_in_the_middle_keeps_branches_apart() -> None:
    host = Host("wan")

    def off(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            pipe._guidance_scale = 1.0
        return values

    plain = host(callback_on_step_end=off)
    with hasten.accelerate(host.pipe, Recipe(reuse=NetworkReuse(rule=Spread(share=1)))) as run:
        assert torch.equal(host(callback_on_step_end=off), plain)
    assert {e.branch for e in run.trace.events if e.step <= 2} == {0, 1}
    assert {e.branch for e in run.trace.events if e.step > 2} == {0}


def test_solver_with_two_evaluations_per_step() -> None:
    host = Host("wan")
    host.pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    plain = host()
    with hasten.accelerate(host.pipe, "plain") as run:
        assert torch.equal(host(), plain)
    assert {e.step for e in run.trace.events} == set(range(11)) and run.trace.runs[0].steps == 11
    with hasten.accelerate(host.pipe, ALTERNATE) as run:
        assert bool(torch.isfinite(host()).all())
    assert computed(run) == {0, 2, 4, 6, 8, 10}


def test_scheduler_replaced_inside_the_session() -> None:
    host = Host("wan")
    old = host.pipe.scheduler
    new = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    with hasten.accelerate(host.pipe, ALTERNATE) as run:
        host()
        host.pipe.scheduler = new
        host()
        assert computed(run) == {0, 2, 4} and len(run.trace.runs) == 2
    assert host.pipe.scheduler is new
    for scheduler in (old, new):
        assert not {"step", "set_timesteps"} & set(vars(scheduler))


def test_two_experts() -> None:
    """Wan 2.2: another network takes over below a noise level."""
    host = Host("wan")
    second = hosts.small_wan(seed=1).transformer
    host.pipe = type(host.pipe)(**{**host.pipe.components, "transformer_2": second, "boundary_ratio": 0.8})
    host.pipe.set_progress_bar_config(disable=True)
    plain = host()
    with hasten.accelerate(host.pipe, "plain") as run:
        assert torch.equal(host(), plain)
    assert {e.site for e in run.trace.events} == {"transformer", "transformer_2"}
    with hasten.accelerate(host.pipe, ALTERNATE) as run:
        host()
    first = min(e.step for e in run.trace.events if e.site == "transformer_2")
    assert all(e.action == "compute" for e in run.trace.events if e.step == first)
