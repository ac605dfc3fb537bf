"""Training a masked image model: prepared once, resumed bit-identically, opened as a pipeline; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hasten.distill.data.moving_digits import Digits
from hasten.distill.pretrain.masked_images import draw_images, pretrain_masked
from hasten.distill.pretrain.masked_images_bundle import bundle_masked
from hasten.distill.pretrain.masked_images_config import MaskedImageConfig
from hasten.distill.pretrain.text_config import load_any
from hasten.errors import ModelError, ResumeError, UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.loading import open_pipeline
from hasten.pipelines.masked_codes import is_masked_image
from hasten.pipelines.masked_images import MaskedImagePipeline

SMALL = {
    "model.width": 16, "model.layers": 1, "model.heads": 2, "model.ffn": 32, "codes.count": 12, "codes.patch": 8,
    "codes.rounds": 2, "codes.sample": 200, "digits.images": 40, "digits.batch": 4, "training.steps": 4,
    "training.warmup": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handwriting of noise instead of scikit-learn's, and a judge's reference of few images."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 28, 28), generator=g).to(torch.uint8)
    made = Digits(images, torch.arange(30) % 10, 20, "noise")
    monkeypatch.setattr("hasten.distill.pretrain.masked_images.load_digits", lambda data: made)
    monkeypatch.setattr("hasten.distill.pretrain.masked_images_bundle.load_digits", lambda data: made)
    monkeypatch.setattr("hasten.distill.pretrain.masked_images.REFERENCE", 3)


def config(**changes: Any) -> MaskedImageConfig:
    found = load_any("tiny-mask", {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}})
    assert isinstance(found, MaskedImageConfig)
    return found


def test_resumed_bit_identically_and_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain_masked(config(), out=one, progress=False)
    assert pretrain_masked(config(), out=two, progress=False, stop_after=2) == two / "latest"
    folder = pretrain_masked(config(), out=two, progress=False, resume=True)
    for file in ("model.safetensors", "codebook.safetensors", "reference.safetensors"):
        left, right = load_file(one / "model" / file), load_file(folder / file)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    pipe = MaskedImagePipeline.from_pretrained(folder)
    images = pipe([3, 10], output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (2, 1, 32, 32)
    with pytest.raises(ResumeError, match="digits.batch"):
        pretrain_masked(config(digits__batch=5), out=two, progress=False, resume=True)
    bundled(two, tmp_path / "models", monkeypatch)


def bundled(out: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished training becomes a bundled model: an honest card, opened by its name, with words for classes."""
    card = bundle_masked(out, models / "tiny-mask", data="noise", guidance_scale=3.0)
    monkeypatch.setattr(tiny_models, "_BUNDLED", models)
    assert card["kind"] == "masked-image" and card["data"] == "noise" and card["steps"] == {"image": 4}
    assert card["settings"]["training"]["steps"] == 4 and len(card["sha256"]) == 3
    assert all(tiny_models.verify("tiny-mask").values()) and is_masked_image("tiny-mask") and is_masked_image(out / "model")
    pipe = tiny_models.load("tiny-mask", dtype=torch.bfloat16)
    assert isinstance(pipe, MaskedImagePipeline) and pipe.model.dtype == torch.bfloat16
    assert pipe.words.class_of("a seven") == 7 and tiny_models.call_defaults(pipe) == {"guidance_scale": 3.0}
    with pytest.raises(ModelError, match="masked image model, and no diffusers pipeline"):
        open_pipeline("tiny-mask")


def test_nothing_to_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Finish the training"):
        bundle_masked(tmp_path, tmp_path / "model", data="noise")
    assert not is_masked_image(tmp_path) and not is_masked_image("tiny-nothing")


def test_digits_lie_near_the_centre() -> None:
    digits = Digits(torch.full((4, 28, 28), 255, dtype=torch.uint8), torch.arange(4), 2, "white")
    images, classes = draw_images(digits, 50, 20, "train", 1)
    assert images.shape == (50, 32, 32) and set(classes.tolist()) == {0, 1}
    assert not images[:, :5].any() and not images[:, -5:].any() and bool((images[:, 8:24, 8:24] > 0.99).all())
    assert set(draw_images(digits, 50, 20, "test", 1)[1].tolist()) == {2, 3}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"codes__patch": 5}, "divide 32"),
        ({"model__attention": "causal"}, "any order"),
        ({"model__positions": 8}, "model.positions"),
        ({"digits__colour": 1}, "colour"),
    ],
)
def test_refused_configurations(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        config(**change)
