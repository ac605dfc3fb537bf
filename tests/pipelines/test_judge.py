"""The judge reads real clips rightly; its distances behave as their definitions say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.errors import ModelError, UsageError
from hasten.pipelines import judge as judging
from hasten.pipelines.judge import DIGITS, DIRECTIONS, SPEEDS, Judge, frechet, parse_prompt, precision, recall

MNIST = Path(__file__).resolve().parents[3] / "shared" / "real" / "mnist"
BUNDLED = Path(judging.__file__).parent / "bundled" / "judge" / "judge.json"

needs_judge = pytest.mark.skipif(not BUNDLED.is_file(), reason="the judge's weights are not in this checkout")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models gain nothing from threads, and lose a lot where the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_judge
def test_reads_unseen_real_clips() -> None:
    if not MNIST.is_dir():
        pytest.skip("the MNIST pictures are not on this machine")
    from hasten.distill.data.moving_digits import load_digits, sample_clips, sample_images

    digits = load_digits(MNIST)
    clips = sample_clips(digits, 300, seed=123, split="test")
    videos = clips.frames.unsqueeze(-1).expand(-1, -1, -1, -1, 3)
    scores = Judge.load().prompt_accuracy(list(videos), clips.prompts)
    assert scores["digit"] >= 0.95 and scores["direction"] >= 0.98 and scores["speed"] >= 0.95
    images = sample_images(digits, 300, seed=124, split="test")
    pictures = images.frames[:, 0].unsqueeze(-1).expand(-1, -1, -1, 3)
    assert Judge.load().prompt_accuracy(list(pictures), images.prompts)["digit"] >= 0.93


@needs_judge
def test_reads_motion_of_other_handwriting() -> None:
    pytest.importorskip("sklearn")
    from hasten.distill.data.moving_digits import load_digits, sample_clips

    clips = sample_clips(load_digits("sklearn"), 100, seed=5)
    readings = Judge.load().read_all(clips.frames.unsqueeze(-1).expand(-1, -1, -1, -1, 3))
    right = [r.direction == DIRECTIONS[d] for r, d in zip(readings, clips.direction, strict=True)]
    assert np.mean(right) >= 0.95


@needs_judge
def test_every_way_to_give_frames_reads_the_same() -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    clip = (rng.random((17, 32, 32, 1)).repeat(3, -1) * 255).astype(np.uint8)
    judge = Judge.load()
    by_array = judge.read(clip)
    for other in (torch.from_numpy(clip), clip / 255.0, [Image.fromarray(frame) for frame in clip]):
        reading = judge.read(other)
        torch.testing.assert_close(reading.features, by_array.features, atol=1e-4, rtol=1e-4)
        assert (reading.digit, reading.direction, reading.speed) == (
            by_array.digit,
            by_array.direction,
            by_array.speed,
        )
    assert judge.read(clip[0]).direction is None and judge.read(clip[0]).features.shape == (48,)
    assert judge.read(clip[:9]).direction in DIRECTIONS and by_array.speed in SPEEDS
    with pytest.raises(UsageError, match="expected a clip"):
        judge.read(np.zeros((2, 3, 4, 5, 6)))


@needs_judge
def test_reference_features_are_near_themselves() -> None:
    judge = Judge.load()
    for kind in ("video", "image"):
        features = judge.reference_features(kind)
        noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)) + 5
        assert judge.frechet_to_real(features, kind) < judge.frechet_to_real(noise, kind) / 20
        assert recall(features[:256], features[256:]) > 0.5


def test_prompts_are_parsed() -> None:
    assert parse_prompt("A seven moving LEFT, slowly") == {"digit": 7, "direction": "left", "speed": "slowly"}
    assert parse_prompt("the digit 3 is quickly going up") == {
        "digit": 3,
        "direction": "up",
        "speed": "quickly",
    }
    assert parse_prompt("a thick nine at the top left") == {"digit": 9}
    assert all(parse_prompt(f"a {word}")["digit"] == i for i, word in enumerate(DIGITS))
    with pytest.raises(UsageError, match="names no digit"):
        parse_prompt("a cat")


def test_frechet_is_exact_on_gaussians() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 3, generator=g)
    b = torch.randn(20000, 3, generator=g) * 2 + torch.tensor([3.0, 0.0, 0.0])
    assert frechet(a, a) < 1e-6
    assert abs(frechet(a, b) - (9 + 3 * (2 - 1) ** 2)) < 0.3
    assert abs(frechet(a, b) - frechet(b, a)) < 1e-6


def test_recall_and_precision_see_a_lost_mode() -> None:
    g = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(200, 2, generator=g), torch.randn(200, 2, generator=g) + 50])
    half = torch.randn(200, 2, generator=g)
    assert 0.4 < recall(real, half) < 0.55, "only one of two modes is covered"
    assert precision(real, half) > 0.9, "what is drawn is real"
    assert recall(real, real) == 1.0
    with pytest.raises(UsageError, match="more than 3"):
        recall(real, half[:3])


def test_missing_judge_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hasten.distill.pretrain.judge"):
        Judge.load(tmp_path)


def test_a_judge_can_be_trained_on_any_handwriting(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from hasten.distill.pretrain.judge import JudgeConfig, train_judge

    config = JudgeConfig(steps=6, batch=8, test_clips=16, reference=8)
    card = train_judge(config, out=tmp_path / "judge", data="sklearn", progress=False)
    assert set(card["accuracy"]) == {"digit", "direction", "speed", "image_digit"}
    clip = np.zeros((17, 32, 32, 3))
    assert 0 <= Judge.load(tmp_path / "judge").read(clip).digit <= 9
