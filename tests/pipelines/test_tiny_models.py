"""The bundled models load offline as ordinary diffusers pipelines and carry an honest card."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hasten.errors import ModelError
from hasten.pipelines import tiny_models
from hasten.pipelines.loading import open_pipeline

DIFFUSERS = [name for name in ("tiny-image", "tiny-video", "tiny-flux") if name in tiny_models.names()]
CLASSES = {"tiny-video": "WanPipeline", "tiny-image": "PixArtSigmaPipeline", "tiny-flux": "FluxPipeline"}

needs_bundle = pytest.mark.skipif(not DIFFUSERS, reason="the bundled weights are not in this checkout")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models gain nothing from threads, and lose a lot where the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_unknown_name_tells_the_nearest_and_the_available() -> None:
    with pytest.raises(ModelError, match="Available") as error:
        tiny_models.path("tiny-vide")
    if "tiny-video" in DIFFUSERS:
        assert "Did you mean 'tiny-video'?" in str(error.value)


@needs_bundle
@pytest.mark.parametrize("name", DIFFUSERS)
def test_card_matches_the_files(name: str) -> None:
    card = tiny_models.card(name)
    assert card["name"] == name and card["licence"] and card["data"] and card["steps"]["denoiser"] > 0
    assert tiny_models.verify(name) and all(tiny_models.verify(name).values())
    folder = tiny_models.path(name)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 16 * 2**20
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    curves = json.loads((folder / "loss.json").read_text())
    first = curves.get("shallow", curves["denoiser"])  # a grown model begins with what a shallower one has learned
    assert all(len(curve) <= 200 for curve in curves.values())
    assert curves["denoiser"][-1]["loss"] < first[0]["loss"] / 2, "the model was trained"


@needs_bundle
@pytest.mark.parametrize("name", DIFFUSERS)
def test_loads_without_network_or_alarming_warnings(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = tiny_models.load(name)
    assert type(pipe).__name__ == CLASSES[name]
    assert not [str(w.message) for w in caught if issubclass(w.category, (UserWarning, FutureWarning))]
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert next(pipe.transformer.parameters()).dtype == torch.float32
    assert tiny_models.call_defaults(pipe) == tiny_models.call_defaults(name)


@needs_bundle
@pytest.mark.parametrize("name", DIFFUSERS)
def test_draws_something_with_its_default_call(name: str) -> None:
    pipe = tiny_models.load(name)
    pipe.set_progress_bar_config(disable=True)
    call = tiny_models.call_defaults(name) | {"num_inference_steps": 4}
    result = pipe(
        "a seven moving left, slowly", generator=torch.Generator().manual_seed(1), output_type="np", **call
    )
    pictures = result.frames if name == "tiny-video" else result.images
    assert pictures.shape[-3:] == (32, 32, 3)
    assert pictures.min() >= 0 and pictures.max() > 0.2


@needs_bundle
def test_half_precision_and_device() -> None:
    pipe = tiny_models.load(DIFFUSERS[0], dtype=torch.bfloat16, device="cpu")
    assert next(pipe.vae.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in ("tiny-dllm", "tiny-draft") if name in tiny_models.names()])
def test_a_language_model_is_no_diffusers_pipeline(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} is a language model"):
        open_pipeline(name)


def test_defaults_of_a_foreign_pipeline_are_empty(tmp_path: Path) -> None:
    assert tiny_models.call_defaults(object()) == {}


def test_the_package_stays_small() -> None:
    """What is bundled is downloaded by everybody who installs hasten."""
    files = [file for name in tiny_models.names() for file in tiny_models.path(name).rglob("*.safetensors")]
    files += tiny_models.path("tiny-image").parent.glob("*/*.safetensors")
    files += tiny_models.path("tiny-image").parent.glob("students/*/*.safetensors")
    assert sum(file.stat().st_size for file in {file.resolve() for file in files}) < 40_000_000
