"""Which branch is which is measured on real loops, and leaving one out is what switching guidance off is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.seams.guidance import GuidanceSeam
from hasten.recipe import Recipe
from hasten.samplers.guidance import GuidanceInterval, HeldGuidance
from hasten.step import Step
from tests.contract import seeded
from tests.hosts import PIXART_CALL, UNET_CALL, WAN_CALL, small_flux, small_pixart, small_unet, small_wan

NEVER = Recipe(name="never", guidance=GuidanceInterval(low=0, high=0))
pytestmark = pytest.mark.filterwarnings("ignore:hasten")


def generate(pipe: Any, call: dict[str, Any], **changes: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = {**call, "generator": generator, "output_type": "latent", "return_dict": False, **changes}
    return pipe("a seven", **arguments)[0]


def off_after_first(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 1.0
    return values


def test_skipping_equals_guidance_switched_off_sequential() -> None:
    pipe = small_wan()
    expected = generate(pipe, WAN_CALL, callback_on_step_end=off_after_first)
    full = generate(pipe, WAN_CALL)
    with hasten.accelerate(pipe, NEVER) as run:
        found = generate(pipe, WAN_CALL)
        roles = run.guidance.roles if run.guidance else None
    assert torch.equal(found, expected) and not torch.allclose(found, full, rtol=1e-2)
    assert roles is not None and roles.cond_first and not roles.batched
    assert roles.scale == pytest.approx(5.0, rel=1e-3)
    assert [e.action for e in run.trace.events if e.branch == 1] == ["compute", *["skip"] * 5]


def test_skipping_equals_guidance_switched_off_batched() -> None:
    pipe = small_unet()

    def off(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        if step == 0:
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    wanted = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    expected = generate(pipe, UNET_CALL, callback_on_step_end=off, **wanted)
    with hasten.accelerate(pipe, NEVER) as run:
        found = generate(pipe, UNET_CALL)
        roles = run.guidance.roles if run.guidance else None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert roles is not None and roles.batched and not roles.cond_first
    assert roles.scale == pytest.approx(7.5, rel=1e-3)
    assert sum(e.share for e in run.trace.events) == pytest.approx(1 + 5 * 0.5)


def test_network_that_also_returns_a_variance() -> None:
    pipe = small_pixart()
    with hasten.accelerate(pipe, NEVER) as run:
        found = generate(pipe, PIXART_CALL)
        roles = run.guidance.roles if run.guidance else None
    assert roles is not None and roles.batched and roles.cond == 1
    assert roles.scale == pytest.approx(4.5, rel=1e-3) and bool(torch.isfinite(found).all())


def loop(
    pipe: Any, *, uncond_first: bool, scale: Callable[[int], float], guided: Callable[[int], bool] = lambda _: True, steps: int = 6
) -> Tensor:
    """The loop of a user who owns it: two calls of a bare denoiser per step."""
    model, scheduler = pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(steps)
    x, cond, uncond = seeded(3, 1, 16, 2, 4, 4), 5 * seeded(1, 1, 7, 32), 5 * seeded(2, 1, 7, 32)
    with torch.no_grad():
        for i, time in enumerate(scheduler.timesteps):

            def call(text: Tensor, x: Tensor = x, time: Tensor = time) -> Tensor:
                return model(x, timestep=time.expand(1), encoder_hidden_states=text, return_dict=False)[0]

            if not guided(i):
                v = call(cond)
            else:
                first = call(uncond if uncond_first else cond)
                second = call(cond if uncond_first else uncond)
                c, u = (second, first) if uncond_first else (first, second)
                v = u + scale(i) * (c - u)
            x = scheduler.step(v, time, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("uncond_first", [False, True])
def test_order_of_calls_does_not_matter(uncond_first: bool) -> None:
    pipe = small_wan()
    expected = loop(pipe, uncond_first=uncond_first, scale=lambda _: 4.0, guided=lambda i: i == 0)
    with hasten.accelerate(pipe.transformer, NEVER, scheduler=pipe.scheduler):
        found = loop(pipe, uncond_first=uncond_first, scale=lambda _: 4.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", ["held-guidance:after=0,every=2", "linear-ag", "guidance-interval"])
@pytest.mark.parametrize("reuse", ["every-other", "listed", "balanced", "auto:latent_error=0.5"])
def test_beside_reuse_the_order_of_calls_does_not_matter(guidance: str, reuse: str) -> None:
    """What reuse has seen of u is what stands in for it, not the placeholder that a u-first pipeline is answered with: neither a
    signal nor a forecast nor the correction of a gap may be made of that."""
    pipe, both = small_wan(), find_recipe(f"{guidance}+{reuse}")
    found, actions = [], []
    for uncond_first in (False, True):
        with hasten.accelerate(pipe.transformer, both, scheduler=pipe.scheduler) as run:
            found.append(loop(pipe, uncond_first=uncond_first, scale=lambda _: 4.0, steps=16))
        counted = [event.action for event in run.trace.events]
        actions.append({action: counted.count(action) for action in ("compute", "reuse", "forecast", "skip")})
        assert actions[-1]["skip"] > 0 and actions[-1]["reuse"] + actions[-1]["forecast"] > 0, actions
    assert actions[0] == actions[1]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_signal_of_u_is_not_that_of_a_placeholder() -> None:
    """The first branch decides, so that u-first may skip other steps; but a u that seems never to change would skip nearly all."""
    pipe, both = small_wan(), find_recipe("held-guidance:after=0,every=2+easycache:limit=0.5")
    plain, off = loop(pipe, uncond_first=True, scale=lambda _: 4.0, steps=16), []
    for uncond_first in (False, True):
        with hasten.accelerate(pipe.transformer, both, scheduler=pipe.scheduler) as run:
            made = loop(pipe, uncond_first=uncond_first, scale=lambda _: 4.0, steps=16)
        off.append(float((made - plain).norm() / plain.norm()))
        assert run.report().totals["reuse"] > 0 and run.report().totals["skip"] > 0
    assert off[1] < 2 * off[0] + 0.05, off


def test_held_difference_is_the_same_in_both_orders() -> None:
    pipe, recipe = small_wan(), Recipe(guidance=HeldGuidance(after=0, every=2))
    found = []
    for uncond_first in (False, True):
        with hasten.accelerate(pipe.transformer, recipe, scheduler=pipe.scheduler) as run:
            found.append(loop(pipe, uncond_first=uncond_first, scale=lambda _: 4.0))
        assert sum(e.action == "skip" for e in run.trace.events) == 3
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_scale_that_changes_is_followed_or_refused() -> None:
    """With c first the pipeline itself applies its scale; with u first a change is noticed and nothing is left out."""
    pipe, recipe = small_wan(), Recipe(guidance=HeldGuidance(after=0, every=2))
    notes = {}
    for uncond_first in (False, True):
        with hasten.accelerate(pipe.transformer, recipe, scheduler=pipe.scheduler) as run:
            loop(pipe, uncond_first=uncond_first, scale=lambda i: 4.0 if i < 3 else 2.0)
        notes[uncond_first] = " ".join(run.trace.notes)
    assert "scale changes" in notes[True] and "scale changes" not in notes[False]


def test_guidance_switched_off_with_two_images() -> None:
    pipe = small_unet()

    def off(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    wanted = {
        "callback_on_step_end": off,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "num_images_per_prompt": 2,
    }
    plain = generate(pipe, UNET_CALL, **wanted)
    late = Recipe(guidance=GuidanceInterval(low=0.5, high=1.0))  # all guided steps of this run are inside
    with hasten.accelerate(pipe, late):
        assert torch.equal(generate(pipe, UNET_CALL, **wanted), plain)


def test_guidance_goes_on_with_the_second_expert() -> None:
    pipe, other = small_wan(), small_wan(seed=1)
    pipe = type(pipe)(**{**pipe.components, "transformer_2": other.transformer, "boundary_ratio": 0.8})
    pipe.set_progress_bar_config(disable=True)
    with hasten.accelerate(pipe, NEVER) as run:
        generate(pipe, WAN_CALL)
    assert "skip" in {event.action for event in run.trace.events if event.site == "transformer_2"}


def test_without_guidance_it_says_so() -> None:
    pipe = small_flux()
    with pytest.warns(UserWarning, match="one branch"), hasten.accelerate(pipe, NEVER) as run:
        generate(pipe, {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 16})
    assert any("one branch" in note for note in run.trace.notes)


def test_second_branch_of_flux_is_found() -> None:
    pipe = small_flux()
    call = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 16}
    with hasten.accelerate(pipe, NEVER) as run:
        generate(pipe, call, negative_prompt="blurry", true_cfg_scale=3.0)
        roles = run.guidance.roles if run.guidance else None
    assert roles is not None and roles.scale == pytest.approx(3.0, rel=1e-3)
    assert sum(event.action == "skip" for event in run.trace.events) == 3


def test_rescaled_guidance_is_refused() -> None:
    pipe = small_unet()
    plain = generate(pipe, UNET_CALL, guidance_rescale=0.7)
    with hasten.accelerate(pipe, NEVER) as run:
        assert torch.equal(generate(pipe, UNET_CALL, guidance_rescale=0.7), plain)
    assert any("rescaling" in note for note in run.trace.notes)


@pytest.mark.parametrize("scale", [1.5, 4.0, 30.0])
@pytest.mark.parametrize("cond", [0, 1])
def test_roles_are_measured(scale: float, cond: int) -> None:
    seam = GuidanceSeam(GuidanceInterval().start())
    outputs = {0: seeded(0, 2, 4, 8), 1: seeded(1, 2, 4, 8)}
    for branch, output in outputs.items():
        step = Step(0, 10, 1.0, branch)
        seam.evaluated(step, output)
        seam.returned(step, output)
    c, u = outputs[cond], outputs[1 - cond]
    seam.tick(u + scale * (c - u))
    assert seam.roles is not None and seam.roles.cond == cond
    assert seam.roles.scale == pytest.approx(scale, rel=1e-4)
