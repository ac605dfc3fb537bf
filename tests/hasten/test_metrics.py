"""Metrics on cases whose answer is known, against scikit-image, and on random pairs."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from hasten.errors import UsageError
from hasten.metrics import (
    as_frames,
    latent_error,
    psnr,
    psnr_by_frame,
    ssim,
    ssim_by_frame,
    summary,
    temporal_flicker,
)

BLACK, GREY, WHITE = (np.full((16, 20, 3), value, np.uint8) for value in (0, 128, 255))
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)


def images(shape: tuple[int, ...] = (3, 12, 13, 3)) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.uint8, shape)


def test_psnr_of_known_pairs() -> None:
    assert psnr(BLACK, WHITE) == pytest.approx(0.0, abs=1e-12)
    assert psnr(BLACK, GREY) == pytest.approx(20 * math.log10(255 / 128))
    assert psnr(GREY, GREY) == math.inf
    assert psnr(BLACK / 255.0, WHITE / 255.0) == pytest.approx(0.0, abs=1e-12)


def test_psnr_does_not_wrap_as_uint8_arithmetic_does() -> None:
    """Two independent uniform images are at 7.7 dB; squares modulo 256 give about 28 dB, never below 24."""
    a, b = (RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2))
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / ((256**2 - 1) / 6)), abs=0.2)
    assert psnr(a, b) < 10


@pytest.mark.parametrize("sigma", [0.01, 0.05])
def test_psnr_of_gaussian_noise(sigma: float) -> None:
    base = np.full((128, 128, 3), 0.5)
    assert psnr(base + RNG.normal(0, sigma, base.shape), base) == pytest.approx(
        20 * math.log10(1 / sigma), abs=0.1
    )


def test_psnr_by_frame_and_over_all() -> None:
    a = np.stack([BLACK, BLACK])
    b = np.stack([BLACK, WHITE])
    assert psnr_by_frame(a, b) == [math.inf, pytest.approx(0.0, abs=1e-12)]
    assert psnr(a, b) == pytest.approx(10 * math.log10(2))


@given(images(), images())
@settings(max_examples=30, deadline=None)
def test_properties_of_pairs(a: np.ndarray, b: np.ndarray) -> None:
    assert psnr(a, b) == psnr(b, a) >= -1e-9
    assert (psnr(a, b) == math.inf) == bool((a == b).all())
    assert psnr(a, b) == pytest.approx(psnr(a / 255.0, b / 255.0), rel=1e-9)
    assert ssim(a, b) == pytest.approx(ssim(b, a)) and -1 - 1e-9 <= ssim(a, b) <= 1 + 1e-9
    assert ssim(a, a) == pytest.approx(1.0)
    assert psnr(a, b) == pytest.approx(psnr(255 - a, 255 - b))
    assert temporal_flicker(a, a) == 0.0
    assert temporal_flicker(a, b) == pytest.approx(-temporal_flicker(b, a))
    assert 0.0 <= temporal_flicker(a) <= 2.0


@given(hnp.arrays(np.float64, (2, 3, 4), elements=st.floats(-10, 10)), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_latent_error_is_relative(a: np.ndarray, scale: float) -> None:
    reference = a + 20.0
    assert latent_error(reference, reference) == 0.0
    assert latent_error(a, reference) == pytest.approx(latent_error(scale * a, scale * reference))
    assert latent_error(1.5 * reference, reference) == pytest.approx(0.5)


def test_latent_error_of_zero_references() -> None:
    zero = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert latent_error(zero, zero) == 0.0
    assert latent_error(zero + 1, zero) == math.inf


def test_ssim_of_identical_frames_is_one() -> None:
    assert ssim(NOISE, NOISE) == pytest.approx(1.0)
    assert len(ssim_by_frame(NOISE, NOISE)) == 4


def noisy_pair() -> tuple[np.ndarray, np.ndarray]:
    ramp = np.linspace(0, 1, 30 * 40 * 3).reshape(30, 40, 3)
    return ramp, np.clip(ramp + RNG.normal(0, 0.1, ramp.shape), 0, 1)


def test_ssim_agrees_with_its_definition() -> None:
    """Window by window, straight from the formula."""
    a, b = noisy_pair()
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window = (window / window.sum())[..., None]
    values = []
    for row in range(30 - 10):
        for column in range(40 - 10):
            x, y = (image[row : row + 11, column : column + 11] for image in (a, b))
            mx, my = (window * x).sum((0, 1)), (window * y).sum((0, 1))
            vx, vy = (window * (x - mx) ** 2).sum((0, 1)), (window * (y - my) ** 2).sum((0, 1))
            both = (window * (x - mx) * (y - my)).sum((0, 1))
            values.append(
                (2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
            )
    assert ssim(a, b) == pytest.approx(float(np.mean(values)), abs=1e-10)


def test_ssim_agrees_with_scikit_image() -> None:
    peer = pytest.importorskip("skimage.metrics", reason="scikit-image is an optional extra: hasten[metrics]")
    for a, b in (noisy_pair(), (NOISE[0] / 255.0, NOISE[1] / 255.0)):
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        theirs = peer.structural_similarity(a, b, data_range=1.0, channel_axis=-1, **options)
        assert ssim(a, b) == pytest.approx(theirs, abs=1e-10)
        assert psnr(a, b) == pytest.approx(peer.peak_signal_noise_ratio(a, b, data_range=1.0))


def test_flicker_of_known_videos() -> None:
    still = np.stack([GREY] * 4)
    fade = np.linspace(0, 1, 5)[:, None, None, None] * np.ones((5, 4, 4, 3))
    blink = np.stack([BLACK, WHITE, BLACK, WHITE])
    assert temporal_flicker(still) == 0.0
    assert temporal_flicker(fade) == pytest.approx(0.0, abs=1e-12)
    assert temporal_flicker(blink) == pytest.approx(2.0)
    assert temporal_flicker(blink, still) == pytest.approx(2.0)
    assert temporal_flicker(still, blink) == pytest.approx(-2.0)


def test_all_kinds_of_frames_agree() -> None:
    pil = [Image.fromarray(frame) for frame in NOISE]
    for kind in (
        NOISE,
        torch.from_numpy(NOISE),
        pil,
        tuple(NOISE),
        [torch.from_numpy(frame) for frame in NOISE],
    ):
        assert np.array_equal(as_frames(kind), NOISE) and as_frames(kind).dtype == np.uint8
    assert as_frames(pil[0]).shape == as_frames(NOISE[0]).shape == (1, 24, 32, 3)
    assert as_frames([pil[0].convert("L")] * 2).shape == (2, 24, 32, 1)
    assert as_frames(Image.new("L", (5, 4))).shape == (1, 4, 5, 1)
    half = torch.rand(2, 12, 12, 3, dtype=torch.bfloat16)
    assert psnr(half, half.double()) == math.inf


BAD: list[tuple[Any, str]] = [
    (np.zeros((2, 16, 16, 3), np.int64), "int64.*Convert"),
    (np.zeros((16, 16, 3), bool), "bool"),
    (np.full((16, 16, 3), 200.0), "Divide by 255"),
    (np.full((16, 16, 3), -1.0), "x / 2"),
    (np.full((16, 16, 3), np.nan), "NaN"),
    (np.full((16, 16, 3), np.inf), "infinity"),
    (np.zeros((2, 3, 16, 16)), "channel-first"),
    (np.zeros((1, 2, 16, 16, 3)), r"x\[0\]"),
    (np.zeros((16, 16)), "channel axis"),
    (np.zeros((0, 16, 16, 3)), "got"),
    ([], "empty"),
    ([BLACK, np.zeros((4, 4, 3), np.uint8)], "differ"),
    ([np.zeros((2, 4, 4, 3))], "list of videos"),
    (Image.new("CMYK", (4, 4)), "CMYK"),
    ("video.mp4", "str"),
]


@pytest.mark.parametrize(("frames", "message"), BAD)
def test_bad_frames_are_refused_with_the_fix(frames: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        psnr(frames, frames)


def test_mismatches_are_refused() -> None:
    with pytest.raises(UsageError, match=r"equal shapes.*\(1, 16, 20, 3\).*\(1, 8, 20, 3\)"):
        psnr(BLACK, BLACK[:8])
    with pytest.raises(UsageError, match="uint8.*Convert both"):
        psnr(BLACK, BLACK / 255.0)
    with pytest.raises(UsageError, match="11 x 11"):
        ssim(BLACK[:8], BLACK[:8])
    with pytest.raises(UsageError, match="3 frames"):
        temporal_flicker(np.stack([BLACK, BLACK]))
    with pytest.raises(UsageError, match="equal shapes"):
        latent_error(np.zeros(3), np.zeros(4))
    with pytest.raises(UsageError, match="NaN"):
        latent_error(np.array([np.nan]), np.zeros(1))


def test_summary_ranks_identical_results() -> None:
    inf = math.inf
    assert summary([30.0, 20.0, 40.0]) == {"median": 30.0, "worst": 20.0, "n": 3, "identical": 0}
    assert summary([20.0, 30.0]) == {"median": 25.0, "worst": 20.0, "n": 2, "identical": 0}
    assert summary([inf, 20.0, 30.0]) == {"median": 30.0, "worst": 20.0, "n": 3, "identical": 1}
    assert summary([inf, 20.0]) == {"median": 20.0, "worst": 20.0, "n": 2, "identical": 1}
    assert summary([inf, 20.0, inf]) == {"median": None, "worst": 20.0, "n": 3, "identical": 2}
    assert summary([inf]) == {"median": None, "worst": None, "n": 1, "identical": 1}
    errors = summary([0.0, 0.1, 0.3], higher_is_better=False)
    assert errors == {"median": 0.1, "worst": 0.3, "n": 3, "identical": 1}
    json.dumps(summary([inf]), allow_nan=False)


@pytest.mark.parametrize("values", [[], [math.nan], [-math.inf]])
def test_summary_refuses_what_it_cannot_rank(values: list[float]) -> None:
    with pytest.raises(UsageError):
        summary(values)


def test_summary_refuses_infinite_errors() -> None:
    with pytest.raises(UsageError, match="finite"):
        summary([math.inf], higher_is_better=False)
