"""Training images that are written row by row: an ordinary causal model, opened as a pipeline, that drafts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.distill.data.moving_digits import Digits
from hasten.distill.pretrain.masked_images import pretrain_masked
from hasten.distill.pretrain.text_config import load_any
from hasten.errors import ModelError, UsageError
from hasten.pipelines.decode_own.token_images import TokenImagePipeline
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
    monkeypatch.setattr("hasten.distill.pretrain.masked_images.load_digits", lambda data: made)
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


def test_kinds_have_their_attention() -> None:
    for name, attention, reason in (("tiny-tokens", "full", "causal"), ("tiny-mask", "causal", "full")):
        bad: dict[str, Any] = {"model.attention": attention}
        with pytest.raises(UsageError, match=reason):
            load_any(name, bad)
