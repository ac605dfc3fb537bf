"""A budget's session works with a kept recipe only on calls that ask for what it was tuned at: told before anything is run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hasten
from hasten.pipelines.asked import hearing
from hasten.pipelines.host import denoisers
from hasten.pipelines.recipes import recipe
from hasten.pipelines.tune import kept
from hasten.pipelines.tune.fingerprint import known_by
from hasten.recipe import Adapter, Recipe, from_yaml
from hasten.samplers.solver import Solver
from hasten.stamp import Stamp
from tests.hosts import FLUX_CALL, PIXART_CALL, WAN_CALL, small_flux, small_pixart, small_wan

PIPES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan": (small_wan, WAN_CALL), "pixart": (small_pixart, PIXART_CALL), "flux": (small_flux, FLUX_CALL),
}  # fmt: skip
HALF = Recipe(name="half", sampler=Solver(name="unipc", steps=0.5))


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """hasten's own sentences are read from the trace here."""
    warnings.simplefilter("ignore")


def tuned(pipe: Any, made: Recipe, call: dict[str, Any], **changes: Any) -> Recipe:
    """`made` as it would be tuned on `pipe` for `call`."""
    with hearing(pipe) as asked, hasten.accelerate(pipe, "plain") as run:
        generated(pipe, call)
    here = known_by(denoisers(pipe)) | {"scheduler": type(pipe.scheduler).__name__, "steps": call["num_inference_steps"], "shape": run.shape}
    stamp = Stamp(**{
        **here, "model": "small", "budget": "psnr >= 30 dB", "prompts": 4, "kept": 1.0, "speedup": 2.0, "asked": tuple(asked.items()), **changes,
    })  # fmt: skip
    return made.model_copy(update={"name": f"tuned {made.name}", "tuned": stamp})


def generated(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    latents: torch.Tensor = pipe("a seven", output_type="latent", generator=torch.Generator().manual_seed(0), **call)[0]
    return latents


def by(pipe: Any, name: str | Recipe, call: dict[str, Any]) -> torch.Tensor:
    with hasten.accelerate(pipe, name):
        return generated(pipe, call)


@pytest.mark.parametrize("which", PIPES)
def test_other_steps_are_the_online_controllers_and_the_same_are_the_recipes(which: str) -> None:
    """Also where the recipe swaps the solver, which has to be undone before the pipeline asks its scheduler anything."""
    build, call = PIPES[which]
    pipe = build()
    kept.keep(tuned(pipe, HALF, call))
    more = call | {"num_inference_steps": 12}
    plain, auto = generated(pipe, more), by(pipe, "auto:psnr=30", more)
    half = by(pipe, HALF, call)
    scheduler = pipe.scheduler
    with hasten.accelerate(pipe, hasten.Budget(psnr=30)) as run:
        assert run.recipe.name == "tuned half"
        assert torch.equal(generated(pipe, more), auto)
        told = run.trace.facts["budget"]
        assert "num_inference_steps 12 (tuned at 6)" in told and run.recipe.name == "auto" and pipe.scheduler is scheduler
        assert torch.equal(generated(pipe, call), half) and run.recipe.name == "tuned half"
        assert "a tuned recipe" in run.trace.facts["budget"]
        assert torch.equal(generated(pipe, more), auto)
    assert [each.steps for each in run.trace.runs] == [12, 3, 12], "one trace of all of them"
    assert len([note for note in run.trace.notes if "online controller" in note]) == 1, "said once, in one sentence"
    assert not any("elsewhere" in note for note in run.trace.notes)
    assert pipe.scheduler is scheduler and torch.equal(generated(pipe, more), plain), "restored"
    assert "check_inputs" not in vars(pipe)


def test_another_size_is_not_matched_either() -> None:
    pipe = small_wan()
    kept.keep(tuned(pipe, recipe("every-other"), WAN_CALL))
    wide = WAN_CALL | {"width": 48}
    auto = by(pipe, "auto:psnr=30", wide)
    with hasten.accelerate(pipe, hasten.Budget(psnr=30)) as run:
        assert torch.equal(generated(pipe, wide), auto)
    assert "width 48 (tuned at 32)" in run.trace.facts["budget"] and "width 48" in str(run.report())


def test_each_call_has_the_recipe_that_was_tuned_for_it() -> None:
    pipe, six, eight = small_wan(), WAN_CALL, WAN_CALL | {"num_inference_steps": 8}
    kept.keep(tuned(pipe, recipe("every-other"), six, speedup=1.5))
    kept.keep(tuned(pipe, HALF, eight, speedup=3.0))
    with hasten.accelerate(pipe, hasten.Budget(psnr=30)) as run:
        assert run.recipe.name == "tuned half"
        generated(pipe, six)
        assert run.recipe.name == "tuned every-other" and not run.trace.notes
        generated(pipe, eight)
        assert run.recipe.name == "tuned half"
    assert [each.steps for each in run.trace.runs] == [6, 4]


def test_levels_of_ones_own_are_no_steps_that_were_tuned() -> None:
    pipe = small_flux()
    kept.keep(tuned(pipe, recipe("every-other"), FLUX_CALL))
    with hasten.accelerate(pipe, hasten.Budget(psnr=30)) as run:
        generated(pipe, FLUX_CALL | {"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2, 0.1]})
    assert "num_inference_steps of its own (tuned at 6)" in run.trace.facts["budget"] and run.recipe.name == "auto"


def test_a_stamp_from_before_has_steps_alone() -> None:
    pipe = small_wan()
    kept.keep(tuned(pipe, recipe("every-other"), WAN_CALL, asked=()))
    with hasten.accelerate(pipe, hasten.Budget(psnr=30)) as run:
        generated(pipe, WAN_CALL)
        assert run.recipe.name == "tuned every-other"
        generated(pipe, WAN_CALL | {"num_inference_steps": 9})
        assert run.recipe.name == "auto"


def test_what_cannot_be_put_on_later_gives_way(tmp_path: Any) -> None:
    pipe, eight = small_wan(), WAN_CALL | {"num_inference_steps": 8}
    gone = recipe("every-other").model_copy(update={"adapter": Adapter(path=str(tmp_path / "gone.safetensors"))})
    kept.keep(tuned(pipe, HALF, WAN_CALL, speedup=3.0))
    kept.keep(tuned(pipe, gone, eight))
    with hasten.accelerate(pipe, hasten.Budget(psnr=30)) as run:
        generated(pipe, eight)
        assert run.recipe.name == "auto" and "cannot be used" in run.trace.facts["budget"]
        generated(pipe, WAN_CALL)
        assert run.recipe.name == "tuned half"


def test_an_exception_in_a_call_leaves_the_session_fit_for_the_next() -> None:
    pipe = small_wan()
    kept.keep(tuned(pipe, HALF, WAN_CALL))
    half = by(pipe, HALF, WAN_CALL)
    with hasten.accelerate(pipe, hasten.Budget(psnr=30)) as run:
        with pytest.raises(ValueError, match="divisible"):
            generated(pipe, WAN_CALL | {"height": 33})
        assert torch.equal(generated(pipe, WAN_CALL), half)
    assert run.recipe.name == "tuned half"


def test_what_was_asked_is_in_the_file() -> None:
    pipe = small_wan()
    made = tuned(pipe, HALF, WAN_CALL)
    assert made.tuned is not None and dict(made.tuned.asked) == {"num_inference_steps": 6, "height": 32, "width": 32, "num_frames": 5}
    assert from_yaml(made.to_yaml()).tuned == made.tuned
