"""How calls and return values of unlike denoisers are read: lists of images, odd names, halves of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

import hasten
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.forecast import Hold
from hasten.pipelines.host import Call, Layout, Output
from hasten.pipelines.session import Session
from hasten.recipe import Recipe, ReusePolicy
from hasten.samplers.guidance import GuidanceInterval
from tests.conformance.small import every

LISTS = ("ZImageTransformer2DModel", "WanAnimate2Transformer3DModel")


def layout(name: str) -> Layout:
    return Layout.of(every()[name].made())


def run(name: str, reuse: ReusePolicy | None, steps: int = 4) -> tuple[list[Any], Session]:
    """A loop that stands still, so that a stand-in has to be what was computed."""
    small = every()[name]
    model, scheduler = small.made(), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    outputs = []
    with torch.no_grad(), hasten.accelerate(model, Recipe(reuse=reuse), scheduler=scheduler) as session:
        for time in scheduler.timesteps:
            outputs.append(
                small.call(model, small.sample(0, 0), 0.7, {**small.inputs(1, 0), "return_dict": False})
            )
            scheduler.step(torch.zeros(1), time, torch.zeros(1))
    return outputs, session


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(
    "reuse", [NetworkReuse(rule=Every(interval=2), forecast=Hold()), StackReuse(rule=Every(interval=2))]
)
@pytest.mark.filterwarnings("ignore:hasten")
def test_lists_of_images_are_cached(name: str, reuse: ReusePolicy) -> None:
    (plain, *_), _ = run(name, None)
    outputs, session = run(name, reuse)
    assert sum(event.action == "reuse" for event in session.trace.events) >= 2
    for (images,) in outputs:
        assert type(images) is list and len(images) == 1
        torch.testing.assert_close(images[0], plain[0][0], rtol=1e-4, atol=1e-5)


def test_names_of_arguments() -> None:
    film = layout("T5FilmDecoder")
    assert (film.sample, film.timestep) == ("decoder_input_tokens", "decoder_noise_time")
    assert film.conditioning == ("encodings_and_masks",)
    protein = layout("RFD4ProteinaTransformer")
    assert (protein.sample, protein.timestep) == ("bb_ca", "bb_ca_time")
    image = layout("ZImageTransformer2DModel")
    assert (image.sample, image.timestep, image.conditioning) == ("x", "t", ("cap_feats",))
    assert layout("WanTransformer3DModel").sample == "hidden_states"


def test_conditioning_is_found_inside_lists() -> None:
    words = torch.ones(3, 2)
    nested = [(words, torch.zeros(3))]
    names = Layout(("x", "cap_feats"), "x", ("cap_feats",), None)
    assert Call(names, (), {"cap_feats": [words]}).conditioning[0] is words
    assert Call(names, (None, nested), {}).conditioning[0] is words
    assert Call(names, (), {"cap_feats": []}).conditioning == ()


def test_half_of_a_batch_of_lists() -> None:
    """Two images of two channels: the list is the batch, not the channels in it."""
    names = Layout(("x", "cap_feats", "controls"), "x", ("cap_feats",), None)
    images, words = list(torch.randn(2, 2, 4)), [torch.ones(3, 5), torch.ones(7, 5)]
    controls = {0: torch.randn(2, 6)}
    half = Call(names, (images, words), {"controls": controls}).part(2, slice(1, 2))
    assert half.args[0] == [images[1]] and half.args[1] == [words[1]]
    assert torch.equal(half.kwargs["controls"][0], controls[0][1:])


def test_half_of_a_batch_keeps_every_control() -> None:
    """Two residuals for two rows: the list is the ControlNet's blocks, the batch is inside."""
    names = Layout(("hidden_states", "controls"), "hidden_states", (), None)
    controls = [torch.randn(2, 3), torch.randn(2, 3)]
    half = Call(names, (torch.randn(2, 3),), {"controls": controls}).part(2, slice(0, 1))
    assert [value.shape for value in half.kwargs["controls"]] == [(1, 3), (1, 3)]


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: Transformer2DModelOutput(sample=x)])
def test_return_values_are_put_together_again(wrap: Any) -> None:
    images = [torch.zeros(2, 3), torch.ones(2, 3)]
    output = Output(wrap(images))
    assert [tensor.shape for tensor in output.tensors] == [(2, 2, 3)]
    again = output.rebuild([output.tensors[0] + 1])
    found: list[Tensor] = again[0]
    assert type(again) is type(wrap(images)) and type(found) is list
    assert torch.equal(found[0], images[0] + 1) and torch.equal(found[1], images[1] + 1)


def test_images_of_several_sizes_are_left_alone() -> None:
    images = [torch.zeros(2, 3), torch.ones(2, 4)]
    names = Layout(("x",), "x", (), None)
    assert Call(names, (images,), {}).sample is images
    output = Output((images,))
    assert [tensor.shape for tensor in output.tensors] == [(2, 3), (2, 4)]
    again = output.rebuild([tensor + 1 for tensor in output.tensors])[0]
    assert torch.equal(again[1], images[1] + 1)


@pytest.mark.filterwarnings("ignore:hasten")
def test_guidance_runs_half_of_a_list() -> None:
    """Both branches in one list of images (Z-Image): without guidance the conditional half runs alone."""
    small = every()["ZImageTransformer2DModel"]
    model, scheduler = small.made(), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    words = [small.inputs(seed, 0)["cap_feats"][0] for seed in (1, 2)]
    x, rows = small.sample(0, 0), []
    model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    recipe = Recipe(guidance=GuidanceInterval(low=0.0, high=0.0))
    with torch.no_grad(), hasten.accelerate(model, recipe, scheduler=scheduler):
        for node in scheduler.timesteps:
            time = (node / 1000).expand(2)
            uncond, cond = model(x=[x[0], x[0]], t=time, cap_feats=words, return_dict=False)[0]
            assert len(rows) == 1 or torch.equal(uncond, cond)
            guided = (uncond + 3 * (cond - uncond))[None]
            x = scheduler.step(guided, node, x, return_dict=False)[0]
    assert rows == [2, 1, 1, 1] and bool(torch.isfinite(x).all())
