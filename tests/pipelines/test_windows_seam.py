"""Windows of frames on unmodified video pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.seams.windows import KNOWN, WindowedNetwork, shuffled
from hasten.recipe import Recipe
from hasten.samplers.windows import Windows, shares, starts
from tests.conformance.small import every
from tests.contract import seeded
from tests.hosts import WAN_CALL, small_pixart, small_wan


def made(pipe: Any, recipe: Any = None, **call: Any) -> tuple[torch.Tensor, Any]:
    """Latents, and the report."""
    arguments = {**WAN_CALL, "output_type": "latent", "generator": torch.Generator().manual_seed(3)} | call
    if recipe is None:
        return torch.as_tensor(pipe("a seven", **arguments)[0]), None
    with hasten.accelerate(pipe, recipe) as session:
        return torch.as_tensor(pipe("a seven", **arguments)[0]), session.report()


def recipe(**part: Any) -> Recipe:
    return Recipe(name="long", sampler=Windows(**{"frames": 3, "overlap": 1} | part))


def test_a_clip_of_one_window_is_the_plain_run_bit_for_bit() -> None:
    pipe = small_wan(layers=1)
    plain, _ = made(pipe, num_frames=9)
    with pytest.warns(UserWarning, match="One window of 3 latent frames holds this clip of 3"):
        one, report = made(pipe, recipe(noise="shuffled"), num_frames=9)
    assert torch.equal(one, plain)
    assert any("plain run" in note for note in report.trace.notes)


def test_each_window_is_seen_as_a_clip_of_its_own() -> None:
    """Against the network itself, window after window: places in time start anew in each."""
    pipe = small_wan(layers=2)
    network, part = pipe.transformer, Windows(frames=3, overlap=1, blend="cosine")
    x, time, words = seeded(0, 2, 16, 8, 4, 6), torch.tensor([700.0, 300.0]), seeded(1, 2, 5, 32)
    begins = starts(part, 8)
    want = torch.zeros(2, 16, 8, 4, 6)
    with torch.no_grad():
        for begin, share in zip(begins, shares(part, 8, begins), strict=True):
            answer = network(x[:, :, begin : begin + 3], time, words, return_dict=False)[0]
            want[:, :, begin : begin + 3] += answer * torch.tensor(share)[:, None, None]
        for at_once in (0, 1, 2):
            part = part.model_copy(update={"at_once": at_once})
            found = WindowedNetwork(network, network.forward, part, lambda: 0, lambda note: None)
            torch.testing.assert_close(found(x, time, words, return_dict=False)[0], want, rtol=1e-4, atol=1e-4)
        whole = network(x, time, words, return_dict=False)[0]
    assert (whole - want).abs().max() > 1e-2, "which is not what it says of the whole clip"


def test_a_time_for_each_token_is_cut_with_its_frames() -> None:
    seen: dict[str, Any] = {}

    def inner(**told: Any) -> Any:
        seen.update(told)
        return (told["hidden_states"],)

    pipe = small_wan(layers=1)
    x = seeded(0, 2, 16, 5, 4, 4)
    times = torch.arange(5.0).repeat_interleave(4).expand(2, -1)
    part = Windows(frames=3, overlap=1, blend="flat")
    answer = WindowedNetwork(pipe.transformer, inner, part, lambda: 0, lambda note: None)(x, times, seeded(1, 2, 5, 32))
    assert seen["timestep"][:, ::4].tolist() == [[0, 1, 2]] * 2 + [[2, 3, 4]] * 2
    assert torch.equal(seen["encoder_hidden_states"][2:], seen["encoder_hidden_states"][:2])
    torch.testing.assert_close(answer[0], x, msg="shares add up")


@pytest.mark.parametrize("kind", KNOWN[1:])
def test_other_known_networks(kind: str) -> None:
    small = every()[kind]
    network = small.made()
    told = small.inputs(0, 0) | {"hidden_states": small.sample(0, 0), "timestep": small.timestep(0.5)}
    x = told["hidden_states"] = torch.cat([told["hidden_states"]] * 3, 2)
    n = x.shape[2] // 3
    part = Windows(frames=n, overlap=0)
    with torch.no_grad():
        want = network(**told | {"hidden_states": x[:, :, :n]}, return_dict=False)[0]
        got = WindowedNetwork(network, network.forward, part, lambda: 0, lambda note: None)(**told, return_dict=False)[0]
    torch.testing.assert_close(got, torch.cat([want] * 3, 2), rtol=1e-4, atol=1e-4)


def test_a_long_clip_and_everything_as_before() -> None:
    pipe = small_wan(layers=1)
    plain, _ = made(pipe, num_frames=21)
    before = set(vars(pipe)), set(vars(pipe.transformer))
    long, report = made(pipe, recipe(moving=True), num_frames=21)
    assert long.shape == plain.shape and torch.isfinite(long).all() and not torch.equal(long, plain)
    assert report.nfe == made(pipe, "plain", num_frames=21)[1].nfe, "windows of one evaluation are one call"
    assert not torch.equal(long, made(pipe, recipe(moving=False), num_frames=21)[0])
    assert torch.equal(made(pipe, num_frames=21)[0], plain)
    assert (set(vars(pipe)), set(vars(pipe.transformer))) == before


def test_caches_of_whole_evaluations_and_guidance_go_along_others_do_not() -> None:
    pipe = small_wan(layers=1)
    long, report = made(pipe, recipe() | hasten.recipe("every-other"), num_frames=21)
    assert torch.isfinite(long).all() and report.computed_fraction < 0.6
    _, report = made(pipe, recipe() | hasten.recipe("guidance-interval:low=0.5,high=0.9"), num_frames=21)
    assert report.nfe < 12
    for other in ("first-block-cache", "semantic"):
        with pytest.raises(UsageError, match="beside a sampler that cuts clips"):
            hasten.accelerate(pipe, recipe() | hasten.recipe(other))
    with pytest.raises(RefusedError, match="PixArtTransformer2DModel cannot be asked about windows"):
        hasten.accelerate(small_pixart(layers=1), recipe())


def test_shuffled_noise_holds_the_first_windows_frames_in_other_orders() -> None:
    x = seeded(0, 2, 3, 10, 4, 4)
    found = shuffled(x, 4)
    assert torch.equal(found[:, :, :4], x[:, :, :4])
    first = {float(value) for value in x[0, 0, :4, 0, 0]}
    for begin in (4,):
        assert {float(value) for value in found[0, 0, begin : begin + 4, 0, 0]} == first
    assert torch.equal(shuffled(x, 4), found), "a function of the noise"
    pipe = small_wan(layers=1)
    own = seeded(1, 1, 16, 6, 4, 4)
    assert torch.equal(
        made(pipe, recipe(noise="shuffled"), num_frames=21, latents=own)[0], made(pipe, recipe(), num_frames=21, latents=own)[0]
    ), "noise of the caller stays"
