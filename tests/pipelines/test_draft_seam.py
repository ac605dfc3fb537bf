"""Starting from a draft on unmodified pipelines."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import RecipeError, RefusedError, UsageError
from hasten.part import parse
from hasten.pipelines import tiny_models
from hasten.recipe import Recipe, Sampler
from hasten.samplers.draft import Draft
from tests.contract import seeded
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

HOSTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "wan": (lambda: small_wan(layers=1), WAN_CALL),
    "pixart": (lambda: small_pixart(layers=1), PIXART_CALL),
    "flux": (lambda: small_flux(layers=1, single_layers=1), FLUX_CALL),
    "unet": (lambda: with_ddim(small_unet()), UNET_CALL),
}


def with_ddim(pipe: Any) -> Any:
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler(clip_sample=False)
    return pipe


def made(pipe: Any, name: str, recipe: Any = None, **call: Any) -> tuple[torch.Tensor, Any]:
    """Latents, and the report."""
    arguments = {**HOSTS[name][1], "output_type": "latent", "generator": torch.Generator().manual_seed(3)} | call
    if recipe is None:
        return torch.as_tensor(pipe("a seven", **arguments)[0]), None
    with hasten.accelerate(pipe, recipe) as session:
        return torch.as_tensor(pipe("a seven", **arguments)[0]), session.report()


def watched(pipe: Any, name: str, recipe: Any, **call: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a run hands to its solver: the latents before each step, and the outputs."""
    before: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    with hasten.accelerate(pipe, recipe):
        step = pipe.scheduler.step

        def stepped(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            before.append(sample.clone())
            outputs.append(model_output.clone())
            return step(model_output, timestep, sample, *args, **kwargs)

        pipe.scheduler.step = stepped
        pipe("a seven", **{**HOSTS[name][1], "output_type": "latent", "generator": torch.Generator().manual_seed(3)} | call)
    return before, outputs


@pytest.mark.parametrize("name", HOSTS)
def test_the_rest_of_the_run_starts_at_the_draft_with_its_own_noise(name: str) -> None:
    pipe = HOSTS[name][0]()
    plain, _ = made(pipe, name)
    noise: list[torch.Tensor] = []
    inner = pipe.prepare_latents

    def prepared(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        noise.append((found if isinstance(found, torch.Tensor) else found[0]).clone())
        return found

    pipe.prepare_latents = prepared
    before, _ = watched(pipe, name, "draft:recipe=plain,share=0.5")
    del pipe.prepare_latents
    start = before[-3]
    level = made(pipe, name, "draft:recipe=plain,share=0.5")[1].trace.runs[-1].times[0]
    if name in ("wan", "flux"):
        want = (1 - level) * plain + level * noise[0]
    else:
        angle = torch.tensor(level * torch.pi / 2)
        want = angle.cos() * plain + angle.sin() * noise[0]
    torch.testing.assert_close(start, want, rtol=1e-3, atol=1e-3)
    assert torch.equal(noise[0], noise[1]), "one noise, and the generator is asked once"


@pytest.mark.parametrize("name", HOSTS)
def test_the_whole_run_is_walked_where_the_share_is_all_but_nothing(name: str) -> None:
    """With one step left out the rest is the plain run's own list of levels; afterwards all is as before."""
    pipe = HOSTS[name][0]()
    plain, _ = made(pipe, name)
    kept = type(pipe), pipe.scheduler, set(vars(pipe)), set(vars(pipe.scheduler))
    with hasten.accelerate(pipe, "plain") as session:
        made(pipe, name)
    times = session.report().trace.runs[-1].times
    result, report = made(pipe, name, "draft:recipe=plain,share=0.8")
    assert report.trace.runs[-1].times == pytest.approx(times[1:]) and report.trace.runs[-1].finished
    assert result.shape == plain.shape and torch.isfinite(result).all() and not torch.equal(result, plain)
    assert report.trace.facts["drafted"].endswith("by 'plain'")
    assert torch.equal(made(pipe, name)[0], plain)
    assert (type(pipe), pipe.scheduler, set(vars(pipe)), set(vars(pipe.scheduler))) == kept


def test_a_draft_is_made_by_any_recipe_and_the_rest_under_the_others() -> None:
    pipe = HOSTS["wan"][0]()
    many = {"num_inference_steps": 12}
    plain, _ = made(pipe, "wan", **many)
    for recipe in ("fewer-steps", "every-other", "bottleneck"):
        result, report = made(pipe, "wan", f"draft:recipe={recipe},share=0.5", **many)
        assert report.nfe == 12 and torch.isfinite(result).all(), "six steps of two branches"
        assert len(report.trace.runs) == 1, "the draft is no run of ours"
    drafted, _ = made(pipe, "wan", "draft:recipe=fewer-steps,steps=12,share=0.5", **many)
    both, report = made(pipe, "wan", "draft:recipe=fewer-steps,share=0.5+every-other", **many)
    assert report.computed_fraction < 0.7 and not torch.equal(both, drafted)
    assert torch.equal(made(pipe, "wan", **many)[0], plain)


def test_a_student_makes_the_draft_and_is_gone() -> None:
    pipe = tiny_models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    call = tiny_models.call_defaults(pipe) | {"num_inference_steps": 6, "output_type": "latent"}

    def run() -> torch.Tensor:
        return torch.as_tensor(pipe("a seven", generator=torch.Generator().manual_seed(1), **call)[0])

    plain = run()
    with hasten.accelerate(pipe, "draft:recipe=fastest,share=0.35") as session:
        result, again = run(), run()
    assert "1 evaluations by 'fastest'" in session.report().trace.facts["drafted"]
    assert session.report().nfe == 2 and torch.equal(result, again) and not torch.equal(result, plain)
    assert torch.equal(run(), plain)


def test_a_picture_of_ones_own_is_walked_from_the_middle() -> None:
    pipe = HOSTS["pixart"][0]()
    own = seeded(5, *made(pipe, "pixart")[0].shape)
    before, _ = watched(pipe, "pixart", "draft:recipe='',share=0.35", latents=own)
    assert len(before) == 2
    near, far = [made(pipe, "pixart", f"draft:recipe='',share={share}", latents=own)[0] for share in (0.2, 0.9)]
    apart = [float((result - own).norm()) for result in (near, far)]
    assert apart[0] < apart[1], "the less is walked, the more of the picture is kept"
    with pytest.raises(UsageError, match="pass it as latents="):
        made(pipe, "pixart", "draft:recipe='',share=0.5")


def test_an_error_in_the_middle_leaves_nothing_behind() -> None:
    pipe = HOSTS["wan"][0]()
    plain, _ = made(pipe, "wan")
    calls = []

    def breaks(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        calls.append(i)
        raise ZeroDivisionError

    with hasten.accelerate(pipe, "draft:recipe=plain"):
        with pytest.raises(ZeroDivisionError):
            made(pipe, "wan", callback_on_step_end=breaks)
        assert calls == [0], "the caller's callback belongs to the full model's steps"
        torch.as_tensor(pipe("a seven", **WAN_CALL, output_type="latent")[0])
    assert torch.equal(made(pipe, "wan")[0], plain)


def test_what_cannot_be_right_is_refused_in_words() -> None:
    from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline

    pipe = HOSTS["unet"][0]()
    for scheduler, said in ((EulerDiscreteScheduler(), "scales its latents"), (HeunDiscreteScheduler(), "in the middle")):
        own, pipe.scheduler = pipe.scheduler, scheduler
        with pytest.raises(RefusedError, match=said):
            hasten.accelerate(pipe, "draft:recipe=plain")
        pipe.scheduler = own
    taken = inspect.signature(StableDiffusionImg2ImgPipeline.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    with pytest.raises(RefusedError, match="strength"):
        hasten.accelerate(StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False), "draft:recipe=plain")
    with pytest.raises(UsageError, match="starts from a draft itself"):
        hasten.accelerate(pipe, "draft:recipe=draft")
    with pytest.raises(RecipeError, match="Unknown recipe 'fasst'"):
        hasten.accelerate(pipe, "draft:recipe=fasst")
    with pytest.raises(RefusedError, match="distilled student"):
        hasten.accelerate(pipe, "draft:recipe=fastest")
    with pytest.raises(UsageError, match="bare denoiser"):
        hasten.accelerate(pipe.unet, Recipe(sampler=Draft()), scheduler=pipe.scheduler)
    assert type(pipe).__name__ == "StableDiffusionPipeline" and not hasattr(type(pipe), "_hasten_plain")


def test_the_share_is_of_the_steps_asked_for() -> None:
    assert [Draft(share=0.3).begin(steps) for steps in (50, 10, 1)] == [35, 7, 0]
    assert parse(Sampler, {"kind": "draft", "recipe": "fast", "share": 0.2}, "test") == Draft(share=0.2)
    with pytest.raises(ValueError):
        Draft(share=1.0)
