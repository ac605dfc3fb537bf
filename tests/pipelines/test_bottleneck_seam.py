"""Several resolutions on unmodified pipelines."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.host import denoisers
from hasten.pipelines.seams.bottleneck import Latents
from hasten.recipe import Recipe
from hasten.samplers.bottleneck import Bottleneck, Stage
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
    "unet": (small_unet, UNET_CALL),
}
LOW = Bottleneck(
    stages=(Stage(steps=0.3, until=0.3), Stage(steps=0.5, begin=0.2, until=0.7, scale=0.5), Stage(steps=0.3, begin=0.6))
)


def made(pipe: Any, name: str, recipe: Any = None, **call: Any) -> tuple[torch.Tensor, Any]:
    """Latents, and the report."""
    arguments = {**HOSTS[name][1], "output_type": "latent", "generator": torch.Generator().manual_seed(3)} | call
    if recipe is None:
        return torch.as_tensor(pipe("a seven", **arguments)[0]), None
    with hasten.accelerate(pipe, recipe) as session:
        return torch.as_tensor(pipe("a seven", **arguments)[0]), session.report()


def first_order(name: str) -> Any:
    """The host, with a scheduler whose own steps are of first order."""
    from diffusers import DDIMScheduler

    pipe = HOSTS[name][0]()
    if "FlowMatch" not in type(pipe.scheduler).__name__:
        pipe.scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    return pipe


@pytest.mark.parametrize("name", HOSTS)
def test_one_stage_of_first_order_is_the_plain_run(name: str) -> None:
    pipe = first_order(name)
    plain, _ = made(pipe, name, num_inference_steps=5)  # DDIM goes from level to level where their number divides 1000
    one, report = made(pipe, name, Recipe(sampler=Bottleneck(stages=(Stage(steps=1),), order=1)), num_inference_steps=5)
    torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-4)
    wrong, _ = made(pipe, name, Recipe(sampler=Bottleneck(stages=(Stage(steps=1, shift=1.5),), order=1)), num_inference_steps=5)
    assert (wrong - plain).abs().max() > 1e-2, "a shift is another path"
    assert report.nfe == made(pipe, name, "plain", num_inference_steps=5)[1].nfe


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_kept_noise_goes_on_where_the_stage_ended(name: str) -> None:
    """At one size, two stages that meet are the plain run: the data and the noise that was left make a step."""
    pipe = first_order(name)
    plain, _ = made(pipe, name, num_inference_steps=4)
    stages = (Stage(steps=0.5, until=0.5), Stage(steps=0.5, begin=0.5))
    kept, fresh = [
        made(pipe, name, Recipe(sampler=Bottleneck(stages=stages, order=1, noise=noise)), num_inference_steps=4)[0]
        for noise in ("kept", "fresh")
    ]
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-4)
    assert (fresh - plain).abs().max() > 0.1


@pytest.mark.parametrize("noise", ["fresh", "kept"])
@pytest.mark.parametrize("name", HOSTS)
def test_the_network_sees_the_resolution_of_each_stage(name: str, noise: str) -> None:
    pipe = HOSTS[name][0]()
    plain, _ = made(pipe, name)
    before = {key: dict(vars(value)) for key, value in {**denoisers(pipe), "scheduler": pipe.scheduler}.items()}
    seen: list[tuple[int, ...]] = []
    network = next(iter(denoisers(pipe).values()))

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1:])

    hook = network.register_forward_pre_hook(see, with_kwargs=True)
    low, report = made(pipe, name, Recipe(sampler=LOW.model_copy(update={"noise": noise})))
    hook.remove()
    assert low.shape == plain.shape and torch.isfinite(low).all()
    assert report.trace.runs[-1].finished and report.trace.runs[-1].steps == 7
    sizes = list(dict.fromkeys(seen))
    assert len(sizes) == 2 and seen[0] == seen[-1] == sizes[0]
    assert sizes[0].numel() == 4 * sizes[1].numel()
    again, _ = made(pipe, name, Recipe(sampler=LOW.model_copy(update={"noise": noise})))
    assert torch.equal(again, low), "a seed decides"
    assert torch.equal(made(pipe, name)[0], plain), "everything is as it was"
    for key, value in {**denoisers(pipe), "scheduler": pipe.scheduler}.items():
        assert vars(value).keys() == before[key].keys()


def test_pictures_of_other_shapes_keep_them() -> None:
    """Rows and columns of packed latents must not be mixed up."""
    pipe = HOSTS["flux"][0]()
    low, _ = made(pipe, "flux", Recipe(sampler=LOW), height=32, width=64)
    assert low.shape == made(pipe, "flux", height=32, width=64)[0].shape
    low, _ = made(pipe, "flux", Recipe(sampler=LOW))
    assert low.shape == made(pipe, "flux")[0].shape, "and the next size is another"


def test_tokens_are_folded_as_the_pipeline_folds_them() -> None:
    pipe = HOSTS["flux"][0]()
    latents = Latents(pipe.transformer, packed=True)
    x = seeded(0, 2, 3, 6, 10)
    packed = type(pipe)._pack_latents(x, 2, 3, 6, 10)
    assert torch.equal(latents.closed(x), packed)
    assert torch.equal(latents.opened(packed), x)


def test_places_are_those_of_a_small_picture_or_stretched() -> None:
    pipe, seen = HOSTS["flux"][0](), []
    words = FLUX_CALL["max_sequence_length"]
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda m, a: seen.append(a[0][words:]))
    for positions in ("own", "stretched"):
        made(pipe, "flux", Recipe(sampler=LOW.model_copy(update={"positions": positions})), height=64, width=32)
        full, small = seen[0], min(seen, key=len)
        rows, columns = [sorted(set(small[:, axis].tolist())) for axis in (1, 2)]
        tall, wide = (int(full[:, axis].max()) + 1 for axis in (1, 2))
        assert len(rows) * 2 == tall and len(columns) * 2 == wide
        assert rows == ([*range(len(rows))] if positions == "own" else [0.5 + 2 * i for i in range(len(rows))])
        seen.clear()


def test_frames_shrink_too_and_sizes_are_whole_patches() -> None:
    pipe = HOSTS["wan"][0]()
    latents = Latents(pipe.transformer, packed=False)
    stage = Stage(steps=1, scale=0.5, frames=0.5)
    assert latents.size((9, 8, 12), stage) == (5, 4, 6)
    assert latents.size((1, 6, 6), stage) == (1, 4, 4), "rounded to the patch of 2, half to even"
    assert latents.size((2, 2, 2), Stage(steps=1, scale=0.1)) == (2, 2, 2)
    stages = (Stage(steps=0.3, until=0.3), stage.model_copy(update={"begin": 0.2, "until": 0.6}), Stage(steps=0.3, begin=0.5))
    with pytest.warns(UserWarning, match="no whole patches"):
        low, report = made(pipe, "wan", Recipe(sampler=Bottleneck(stages=stages)), height=48, width=48, num_frames=9)
    assert low.shape == made(pipe, "wan", height=48, width=48, num_frames=9)[0].shape
    assert any("no whole patches" in note for note in report.trace.notes)


def test_a_constant_keeps_its_value_at_every_size() -> None:
    for shape, sizes in (((1, 2, 8, 6), [(4, 3), (5, 4), (9, 7)]), ((1, 2, 5, 8, 6), [(3, 4, 3), (5, 4, 3), (9, 8, 6)])):
        x = torch.full(shape, 0.7)
        for size in sizes:
            small = Latents.resized(x, size)
            assert tuple(small.shape[2:]) == size
            torch.testing.assert_close(small, torch.full_like(small, 0.7))


def test_what_cannot_be_right_is_refused_in_words() -> None:
    from diffusers import PixArtSigmaPipeline, StableDiffusionImg2ImgPipeline

    pipe = HOSTS["pixart"][0]()
    plain, _ = made(pipe, "pixart")
    with pytest.raises(UsageError, match="reuse beside a sampler that changes its resolution"):
        hasten.accelerate(pipe, hasten.recipe("balanced") | Recipe(sampler=LOW))
    unet = HOSTS["unet"][0]()
    taken = inspect.signature(StableDiffusionImg2ImgPipeline.__init__).parameters
    parts = {name: part for name, part in unet.components.items() if name in taken}
    with pytest.raises(RefusedError, match="strength"):
        hasten.accelerate(StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False), Recipe(sampler=LOW))
    with pytest.raises(UsageError, match="bare denoiser"):
        hasten.accelerate(pipe.transformer, Recipe(sampler=LOW), scheduler=pipe.scheduler)
    assert isinstance(pipe, PixArtSigmaPipeline) and torch.equal(made(pipe, "pixart")[0], plain)


def test_a_loop_that_joins_something_to_the_latents_is_refused() -> None:
    pipe = HOSTS["wan"][0]()
    with hasten.accelerate(pipe, Recipe(sampler=LOW)):
        pipe.scheduler.set_timesteps(4)
        with pytest.raises(RefusedError, match="reads 16 channels, and the loop walks 8"):
            pipe.scheduler.step(seeded(0, 1, 8, 2, 4, 4), 1.0, seeded(1, 1, 8, 2, 4, 4))
