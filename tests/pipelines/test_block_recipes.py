"""What every recipe that leaves blocks out must do on real denoisers; one that is added later is tested unnamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor, nn

import hasten
from hasten.caching.stack import StackReuse
from hasten.drift import Drift
from hasten.pipelines.recipes import blocks, catalogue
from hasten.pipelines.session import Session
from hasten.recipe import Recipe
from tests.contract import seeded
from tests.hosts import (
    FLUX_CALL,
    PIXART_CALL,
    WAN_CALL,
    flux_arguments,
    small_flux,
    small_pixart,
    small_wan,
    wan_arguments,
)

pytestmark = pytest.mark.filterwarnings("ignore:hasten")

NAMES = [entry.name for entry in catalogue() if entry.name.replace("-", "_") in vars(blocks)]
HOSTS = {"wan": (small_wan, WAN_CALL), "pixart": (small_pixart, PIXART_CALL), "flux": (small_flux, FLUX_CALL)}


@pytest.fixture(params=NAMES)
def eager(request: pytest.FixtureRequest) -> Recipe:
    """The recipe, with a limit that nothing exceeds, so that it leaves out all it may."""
    recipe: Recipe = hasten.recipe(request.param)
    reuse = recipe.reuse
    assert isinstance(reuse, StackReuse)
    if isinstance(reuse.rule, Drift):
        rule = reuse.rule.model_copy(update={"limit": 1e6, "max_skips": None})
        recipe = recipe.model_copy(update={"reuse": reuse.model_copy(update={"rule": rule})})
    return recipe


def loop(
    model: nn.Module, recipe: Recipe, arguments: Callable[[int], dict[str, Any]], steps: int = 8, kind: Any = None
) -> tuple[list[Tensor], Session]:
    """Call `model` at each step with `arguments(step)`; the solver's result is thrown away."""
    scheduler = (kind or FlowMatchEulerDiscreteScheduler)()
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    outputs = []
    with torch.no_grad(), hasten.accelerate(model, recipe, scheduler=scheduler) as run:
        for i, time in enumerate(scheduler.timesteps):
            outputs.append(model(**arguments(i), return_dict=False)[0])
            scheduler.step(outputs[-1], time, outputs[-1])
    return outputs, run


def wan() -> tuple[nn.Module, dict[str, Any]]:
    return small_wan().transformer, wan_arguments()


def flux() -> tuple[nn.Module, dict[str, Any]]:
    return small_flux().transformer, {**flux_arguments(joint=2, single=3), "guidance": torch.tensor([3.5])}


def stand_ins(run: Session) -> list[int]:
    """Steps at which some block was left out, in whole or in part."""
    return [e.step for e in run.trace.events if e.action in ("reuse", "forecast") or e.share < 1.0]


@pytest.mark.parametrize("build", [wan, flux])
def test_lossless_on_identical_input(eager: Recipe, build: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    """With the injections of ControlNet on FLUX."""
    model, call = build()
    with torch.no_grad():
        plain = model(**call, return_dict=False)[0]
    outputs, run = loop(model, eager, lambda _: call)
    assert not any("refused" in note for note in run.trace.notes), run.trace.notes
    assert stand_ins(run)
    for out in outputs:
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(**call, return_dict=False)[0], plain), "put back exactly"
    assert not any(name.endswith("blocks") for name in vars(model))


@pytest.mark.parametrize("host", HOSTS)
def test_pipelines_run_skip_and_are_restored(eager: Recipe, host: str) -> None:
    build, call = HOSTS[host]
    pipe = build()
    call = {**call, "output_type": "latent", "num_inference_steps": 8}

    def draw() -> Tensor:
        return pipe("a", generator=torch.Generator().manual_seed(0), **call)[0]  # type: ignore[no-any-return]

    plain = draw()
    with hasten.accelerate(pipe, eager) as run:
        first, second = draw(), draw()
    assert torch.equal(first, second), "a second run decides like the first"
    assert bool(torch.isfinite(first).all()) and first.shape == plain.shape
    assert not any("refused" in note for note in run.trace.notes), run.trace.notes
    assert stand_ins(run) and not torch.equal(first, plain)
    assert run.report().of(0).computed_fraction < 1.0
    assert run.trace.bytes_peak > 0
    assert torch.equal(draw(), plain)


def test_branches_do_not_mix(eager: Recipe) -> None:
    """Two conditionings alternate; each must come out as when it runs alone."""
    model, call = wan()
    other = {**call, "encoder_hidden_states": seeded(9, 1, 5, 32)}

    def alternate(recipe: Recipe, calls: list[dict[str, Any]]) -> list[Tensor]:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(8)
        found = []
        with torch.no_grad(), hasten.accelerate(model, recipe, scheduler=scheduler):
            for time in scheduler.timesteps:
                outs = [model(**one, return_dict=False)[0] for one in calls]
                scheduler.step(outs[0], time, outs[0])
                found.append(outs[-1])
        return found

    alone, beside = alternate(eager, [other]), alternate(eager, [call, other])
    for a, b in zip(alone, beside, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_guidance_toggled_and_a_new_resolution(eager: Recipe) -> None:
    """The second branch comes and goes; later the latents grow. No history of another shape is ever used."""
    model, call = wan()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    with torch.no_grad(), hasten.accelerate(model, eager, scheduler=scheduler) as run:
        for i, time in enumerate(scheduler.timesteps):
            size = 4 if i < 4 else 8
            now = {**call, "hidden_states": seeded(0, 1, 16, 2, size, size)}
            out = model(**now, return_dict=False)[0]
            if i % 3:
                model(**{**now, "encoder_hidden_states": seeded(9, 1, 5, 32)}, return_dict=False)
            assert out.shape == (1, 16, 2, size, size) and bool(torch.isfinite(out).all())
            scheduler.step(out, time, out)
    assert 4 not in stand_ins(run), "the first step of a new resolution is computed"


def test_a_broken_run_leaves_nothing_behind(eager: Recipe) -> None:
    model, call = wan()
    fresh, _ = loop(model, eager, lambda _: call)
    scheduler = FlowMatchEulerDiscreteScheduler()
    with torch.no_grad(), hasten.accelerate(model, eager, scheduler=scheduler):
        for broken in (True, False):
            scheduler.set_timesteps(8)
            scheduler.set_begin_index(0)
            for i, time in enumerate(scheduler.timesteps):
                one = {**call, "hidden_states": 3 * call["hidden_states"]} if broken else call
                out = model(**one, return_dict=False)[0]
                if broken and i == 3:
                    break
                if not broken:
                    torch.testing.assert_close(out, fresh[i], rtol=1e-4, atol=1e-5)
                scheduler.step(out, time, out)


def test_not_a_number_does_not_come_back(eager: Recipe) -> None:
    """One step is given NaN; every later step is finite again."""
    model, call = wan()
    bad = {**call, "hidden_states": call["hidden_states"] * float("nan")}
    for where in (0, 2, 3):
        outputs, _ = loop(model, eager, lambda i, where=where: bad if i == where else call, steps=10)
        assert [i for i, out in enumerate(outputs) if not bool(torch.isfinite(out).all())] == [where]


def test_heun(eager: Recipe) -> None:
    model, call = wan()
    outputs, _ = loop(model, eager, lambda i: {**call, "hidden_states": seeded(i, 1, 16, 2, 4, 4)}, 6, FlowMatchHeunDiscreteScheduler)
    assert all(bool(torch.isfinite(out).all()) for out in outputs)


def graphs(recipe: Recipe | None) -> int:
    """Graphs captured when the blocks of Wan are compiled with fullgraph, with and without us."""
    torch._dynamo.reset()
    count = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        count[0] += 1
        return graph.forward

    pipe = small_wan()
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    if recipe is None:
        pipe("a", **WAN_CALL, output_type="latent")
        return count[0]
    with hasten.accelerate(pipe, recipe) as run:
        pipe("a", **WAN_CALL, output_type="latent")
    assert stand_ins(run)
    return count[0]


def test_compiled_blocks_keep_their_graphs(eager: Recipe) -> None:
    assert graphs(eager) == graphs(None) >= 1
