"""The unconditional output restored by bands of spatial frequency."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.recipe import Recipe
from hasten.samplers.guidance_frequency import FrequencyGuidance, low_band
from hasten.step import Step
from tests.contract import seeded
from tests.hosts import WAN_CALL, small_pixart, small_wan


def wave(num: int, size: int = 16) -> Tensor:
    """`num` periods along the width, shape (1, 2, size, size)."""
    line = torch.cos(2 * math.pi * num * torch.arange(size) / size)
    return line.expand(1, 2, size, size).clone()


@pytest.mark.parametrize("size", [(16, 16), (15, 16), (16, 9)])
def test_bands_split_exactly_at_the_radius(size: tuple[int, int]) -> None:
    x = seeded(0, 2, 3, *size)
    full = torch.fft.fft2(x.double())
    rows, columns = (torch.tensor([min(k, n - k) for k in range(n)]) for n in size)
    inside = rows[:, None] ** 2 + columns[None, :] ** 2 <= min(size) ** 2 / 25
    expected = torch.fft.ifft2(full * inside).real.float()
    torch.testing.assert_close(low_band(x, 0.2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("time", "gains"), [(0.9, (1.5, 1.0)), (0.1, (1.0, 1.25))])
def test_each_band_has_its_gain_and_they_do_not_compound(time: float, gains: tuple[float, float]) -> None:
    state = FrequencyGuidance(after=0.0, every=0, low_gain=0.5, high_gain=0.25).start()
    c = seeded(0, 1, 2, 16, 16)
    state.observe(Step(0, 20, 1.0), c, c + wave(1) + wave(6))
    for index in range(1, 6):
        step, now = Step(index, 20, time), seeded(index, 1, 2, 16, 16)
        assert not state.needs(step)
        expected = now + gains[0] * wave(1) + gains[1] * wave(6)
        torch.testing.assert_close(state.estimate(step, now), expected, rtol=1e-4, atol=1e-4)


def test_video_is_split_per_frame_and_packed_tokens_are_not_split() -> None:
    state = FrequencyGuidance(after=0.0).start()
    frames = torch.stack([wave(1), 3 * wave(6)], dim=2)
    state.observe(Step(0, 20, 1.0), torch.zeros_like(frames), frames)
    low, high = state.tensors()
    torch.testing.assert_close(low[:, :, 0], wave(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(high[:, :, 1], 3 * wave(6), rtol=1e-4, atol=1e-4)
    tokens = seeded(1, 1, 16, 4)
    state.observe(Step(1, 20, 0.9), tokens, tokens + 1)
    torch.testing.assert_close(state.estimate(Step(2, 20, 0.8), tokens), tokens + 1)


@pytest.mark.parametrize(("build", "call"), [(small_wan, {}), (small_pixart, {"use_resolution_binning": False, "clean_caption": False})])
@pytest.mark.filterwarnings("ignore:hasten")
def test_a_pipeline_evaluates_fewer_branches(build: Any, call: dict[str, Any]) -> None:
    pipe = build()
    arguments = {"height": 32, "width": 32, "num_inference_steps": 12, "output_type": "latent", "guidance_scale": 3.0, **call}
    if build is small_wan:
        arguments["num_frames"] = WAN_CALL["num_frames"]

    def generate() -> Tensor:
        return pipe("a seven", generator=torch.Generator().manual_seed(0), **arguments)[0]

    plain = generate()
    with hasten.accelerate(pipe, Recipe(guidance=FrequencyGuidance(every=4))) as run:
        found = generate()
    skipped = {e.step for e in run.trace.events if e.action == "skip" or e.share < 1}
    assert skipped == {4, 5, 6, 8, 9, 10}
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.5
    assert torch.equal(generate(), plain)
