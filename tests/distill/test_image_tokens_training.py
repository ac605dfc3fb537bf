"""Training images that are written row by row: an ordinary causal model, opened as a pipeline, that drafts itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.distill.data.moving_digits import Digits
from hasten.distill.pretrain.masked_images import pretrain_masked
from hasten.distill.pretrain.masked_images_bundle import bundle_masked
from hasten.distill.pretrain.text_config import load_any
from hasten.errors import ModelError, UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.decode_own.token_images import TokenImagePipeline
from hasten.pipelines.judge import Judge
from hasten.pipelines.loading import open_pipeline
from hasten.pipelines.masked_codes import is_masked_image, is_token_image
from hasten.pipelines.masked_images import MaskedImagePipeline
from hasten.pipelines.recipes.decode_own import speculative_jacobi

SMALL = {
    "model.width": 16, "model.layers": 1, "model.heads": 2, "model.ffn": 32, "codes.count": 12, "codes.patch": 8,
    "codes.rounds": 2, "codes.sample": 200, "digits.images": 40, "digits.batch": 4, "training.steps": 4,
    "training.warmup": 1,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of four steps, of handwriting of noise."""
    images = torch.randint(256, (30, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    made = Digits(images, torch.arange(30) % 10, 20, "noise")
    for where in ("masked_images", "masked_images_bundle"):
        monkeypatch.setattr(f"hasten.distill.pretrain.{where}.load_digits", lambda data: made)
    monkeypatch.setattr("hasten.distill.pretrain.masked_images.REFERENCE", 3)
    return pretrain_masked(load_any("tiny-tokens", SMALL), out=tmp_path, progress=False)  # type: ignore[arg-type]


def test_written_and_drafted(folder: Path) -> None:
    pipe = TokenImagePipeline.from_pretrained(folder)
    assert not hasattr(pipe.model.config, "hasten_diffusion") and pipe.row == 4
    plain = pipe([3, "a seven", 10], temperature=0, output_type="pt")
    assert plain.images.shape == (3, 1, 32, 32) and plain.codes.shape == (3, 16) and int(plain.codes.max()) < 12
    for noise in ("fresh", "same"):
        recipe = speculative_jacobi(window=5, row=pipe.row, noise=noise)
        assert torch.equal(pipe([3, 7, 10], recipe=recipe, temperature=0).codes, plain.codes)
    drawn = [pipe(4, recipe=speculative_jacobi(window=5), seed=seed).codes for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and int(drawn[2].max()) < 12
    with pytest.raises(UsageError, match="0 to 9"):
        pipe(11)
    with pytest.raises(ModelError, match="row by row"):
        TokenImagePipeline.from_pretrained("tiny-mask")
    with pytest.raises(Exception, match="mask"):
        MaskedImagePipeline.from_pretrained(folder)


def test_bundled_by_its_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished training becomes a bundled model: an honest card, opened by its name, refused where pipelines are wanted."""
    models = tmp_path / "models"
    card = bundle_masked(folder.parent, models / "tiny-tokens", data="noise")
    monkeypatch.setattr(tiny_models, "_BUNDLED", models)
    assert card["kind"] == "image-tokens" and card["call"] == {} and card["data"] == "noise" and card["steps"] == {"image": 4}
    assert set(card["sha256"]) == {"model.safetensors", "codebook.safetensors"} and all(tiny_models.verify("tiny-tokens").values())
    assert is_token_image("tiny-tokens") and not is_masked_image("tiny-tokens") and is_token_image(folder)
    pipe = tiny_models.load("tiny-tokens", dtype=torch.bfloat16)
    assert isinstance(pipe, TokenImagePipeline) and pipe.model.dtype == torch.bfloat16 and tiny_models.call_defaults(pipe) == {}
    with pytest.raises(ModelError, match="image tokens, and no diffusers pipeline"):
        open_pipeline("tiny-tokens")


def test_kinds_have_their_attention() -> None:
    for name, attention, reason in (("tiny-tokens", "full", "causal"), ("tiny-mask", "causal", "full")):
        bad: dict[str, Any] = {"model.attention": attention}
        with pytest.raises(UsageError, match=reason):
            load_any(name, bad)


class TestTheBundledOne:
    """What comes with hasten: small, whole, and drawing what it is asked for."""

    def test_files(self) -> None:
        card, folder = tiny_models.card("tiny-tokens"), tiny_models.path("tiny-tokens")
        assert card["kind"] == "image-tokens" and card["licence"] and "MNIST" in card["data"]
        assert all(tiny_models.verify("tiny-tokens").values())
        assert sum((folder / file).stat().st_size for file in card["sha256"]) < 500_000
        book = (folder / "codebook.safetensors").read_bytes()
        assert book == (tiny_models.path("tiny-mask") / "codebook.safetensors").read_bytes(), "one codebook"
        curve = json.loads((folder / "loss.json").read_text())["image"]
        assert len(curve) <= 200 and curve[-1]["loss"] < curve[0]["loss"] / 4

    def test_digits_are_right_and_draft_themselves(self) -> None:
        pipe, told = tiny_models.load("tiny-tokens"), [number % 10 for number in range(40)]
        made = pipe(told, recipe=speculative_jacobi(row=pipe.row), seed=0, output_type="np")
        read = [reading.digit for reading in Judge.load().read_all([image.repeat(3, -1) for image in made.images])]
        assert sum(a == b for a, b in zip(read, told, strict=True)) >= 32, read
        assert made.report.lossless and made.report.tokens_per_forward > 1.5
