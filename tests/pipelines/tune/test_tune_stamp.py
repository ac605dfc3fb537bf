"""A tuned recipe says where its numbers do not hold, and only there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import RecipeError
from hasten.pipelines.host import denoisers
from hasten.pipelines.tune.fingerprint import known_by, of_weights
from hasten.pipelines.tune.signals import recording
from hasten.recipe import Recipe, from_yaml
from hasten.samplers.solver import Solver
from hasten.stamp import Stamp
from tests.hosts import UNET_CALL, WAN_CALL, small_unet, small_wan

STAMP = Stamp(model="m", weights="a", scheduler="S", steps=12, shape=(4, 8, 8), hardware="cpu", versions=("torch 2.0",), budget="psnr >= 30 dB")


def test_what_is_the_same_is_not_named() -> None:
    same = {"weights": "a", "scheduler": "S", "steps": 12, "shape": (4, 8, 8), "hardware": "cpu", "versions": ("torch 2.0",)}
    assert STAMP.differences(same) == [] and STAMP.differences({}) == []
    for name, other in {"weights": "b", "scheduler": "T", "steps": 13, "shape": (4, 9, 9), "hardware": "gpu", "versions": ("torch 2.1",)}.items():
        assert len(STAMP.differences(same | {name: other})) == 1, name
    assert STAMP.differences({"shape": (4, 9, 9), "steps": 5}) == ["number of steps (12 there, 5 here)", "size (4x8x8 there, 4x9x9 here)"]


def tuned(pipe: Any, call: dict[str, Any], recipe: str | Recipe) -> Recipe:
    """`recipe` with the stamp that a tuning of `call` on `pipe` would give it."""
    with recording(pipe, guided=True) as recorder:
        pipe("a seven", **call)
    here = {"scheduler": type(pipe.scheduler).__name__, "steps": recorder.steps, "shape": recorder.shape} | known_by(denoisers(pipe))
    return hasten.recipe(recipe).model_copy(update={"tuned": Stamp(model="small", budget="psnr >= 30 dB", **here)})


def said(pipe: Any, recipe: Recipe, call: dict[str, Any]) -> list[str]:
    """What a run with the recipe says of its stamp."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with hasten.accelerate(pipe, recipe) as run:
            pipe("a seven", **call)
    return [note for note in run.trace.notes if "was tuned and measured elsewhere" in note]


COMPOSED = Recipe(sampler=Solver(name="unipc", steps=0.5))


@pytest.mark.parametrize("recipe", ["balanced", COMPOSED], ids=["cache", "solver"])
@pytest.mark.parametrize("host", [(small_unet, UNET_CALL), (small_wan, WAN_CALL)], ids=["unet", "wan"])
def test_on_its_own_host_it_says_nothing(host: Any, recipe: str | Recipe) -> None:
    make, call = host
    pipe = make()
    assert said(make(), from_yaml(tuned(pipe, call, recipe).to_yaml()), call) == [], "another copy of the same model is the same"


def test_elsewhere_it_says_what_is_otherwise() -> None:
    pipe = small_unet()
    for recipe in (tuned(pipe, UNET_CALL, "balanced"), tuned(pipe, UNET_CALL, COMPOSED)):
        (steps,) = said(pipe, recipe, UNET_CALL | {"num_inference_steps": 10})
        assert "another number of steps (6 there, 10 here)" in steps and "run hasten tune" in steps
        (size,) = said(pipe, recipe, UNET_CALL | {"height": 48})
        assert "another size (4x16x16 there, 4x24x16 here)" in size
        (weights,) = said(small_unet(seed=1), recipe, UNET_CALL)
        assert "another weights" in weights and "steps" not in weights
    other = small_unet()
    from diffusers import EulerDiscreteScheduler

    other.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config)
    assert "another scheduler (DDIMScheduler there, EulerDiscreteScheduler here)" in said(other, recipe, UNET_CALL)[0]


def test_a_fingerprint_is_of_the_weights_alone() -> None:
    one, same, other = (denoisers(small_unet(seed=seed)) for seed in (0, 0, 1))
    assert of_weights(one) == of_weights(same) != of_weights(other)
    with torch.no_grad():
        next(iter(same.values())).conv_out.weight.view(-1)[0] += 1e-3  # type: ignore[operator, union-attr]
    assert of_weights(one) != of_weights(same)


def test_a_recipe_that_was_changed_was_not_measured() -> None:
    recipe = hasten.recipe("balanced").model_copy(update={"tuned": STAMP})
    assert from_yaml(recipe.to_yaml()).tuned == STAMP
    assert (recipe | Recipe(sampler=Solver())).tuned is None and (Recipe(sampler=Solver()) | recipe).tuned is None
    assert recipe.replace({"reuse.correct": 1}).tuned is None
    with pytest.raises(RecipeError, match=r"unknown key 'tuned.weigths'.*Did you mean 'weights'"):
        from_yaml(recipe.to_yaml().replace("weights:", "weigths:"))
