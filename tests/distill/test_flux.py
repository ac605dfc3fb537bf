"""tiny-flux: an ordinary FluxPipeline, trained on exactly what it is called with; resumes, exports and bundles."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file

pytest.importorskip("sklearn", reason="scikit-learn's digits are the data of these tests")

from hasten.distill.pretrain import tiny, tiny_flux
from hasten.distill.pretrain.bundle import bundle
from hasten.distill.pretrain.config import load_config
from hasten.distill.pretrain.pictures import pretrain
from hasten.errors import ModelError, UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.judge import DIGITS
from hasten.pipelines.solver import other_scheduler
from tests.contract import seeded

WEIGHTS = "pipeline/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(out: Path, overrides: dict[str, Any] | None = None, **settings: Any) -> Path:
    return pretrain(load_config("smoke-flux", overrides), out=out, data="sklearn", progress=False, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flux")
    run(out)
    return out


@pytest.fixture
def pipe(trained: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(trained / "pipeline", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- configuration ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tiny-flux", "smoke-flux"])
def test_bundled_configurations_are_valid(name: str) -> None:
    config = load_config(name)
    assert config.name == name and config.family == "flux"
    assert config.call["true_cfg_scale"] > 1 and "negative_prompt" in config.call, (
        "Flux guides with both only"
    )


def test_size_of_tiny_flux() -> None:
    c = load_config("tiny-flux").denoiser
    count = sum(p.numel() for p in tiny.build_denoiser("image", c, 4, 64, 16).parameters())
    assert 1.5e6 < count < 2e6


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"denoiser.joint.rope": [8, 8, 8]}, r"sum head_dim \(32\).*\(8, 8, 8\)"),
        ({"denoiser.joint.rope": [7, 12, 13]}, "three even numbers"),
        ({"denoiser.patch": 1}, "patch must be 2.*got 1"),
        ({"denoiser.ffn": 64}, "drop ffn"),
        ({"denoiser.layers": 2, "denoiser.shallow": {"layers": 1, "steps": 1}}, "drop ffn.*shallow"),
        ({"denoiser.joint.singles": 2}, "unknown key 'denoiser.joint.singles'.*'single'"),
        ({"kind": "video"}, "for kind: image; drop them"),
        ({"vae.weights": "tiny-image"}, "of tiny-image as it is, so base_dim, .* would do nothing"),
    ],
)
def test_what_flux_cannot_have_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_config("smoke-flux", overrides)


# -- parts ------------------------------------------------------------------------------------------------------
def test_packing_is_the_pipelines() -> None:
    latents = seeded(0, 2, 4, 6, 8)
    tokens = tiny_flux.pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(tiny_flux.unpack(tokens, 3, 4), latents)
    grid = FluxPipeline._prepare_latent_image_ids(2, 3, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(tiny_flux.positions(3, 4), grid)


def test_training_reads_prompts_as_the_pipeline_does(pipe: Any) -> None:
    encoders = tiny_flux.TextEncoders(pipe.text_encoder, pipe.text_encoder_2)
    told = ["a thick three at the top left", ""]
    text, pooled = tiny_flux.encode_ids(encoders, tiny.tokenize(tiny.build_tokenizer(), told, 16).input_ids)
    with torch.no_grad():
        theirs = [pipe.encode_prompt(prompt, max_sequence_length=16)[:2] for prompt in told]
    torch.testing.assert_close(text, torch.cat([states for states, _ in theirs]))
    torch.testing.assert_close(pooled, torch.cat([vector for _, vector in theirs]))


def test_every_digit_has_embeddings_of_its_own(pipe: Any) -> None:
    ids = tiny.tokenize(tiny.build_tokenizer(), [f"a {digit}" for digit in DIGITS], 16).input_ids
    for part in tiny_flux.encode_ids(tiny_flux.TextEncoders(pipe.text_encoder, pipe.text_encoder_2), ids):
        apart = torch.cdist(part.flatten(1), part.flatten(1)) + torch.eye(10) * 1e9
        assert float(apart.min()) > 0.05 * float(part.flatten(1).norm(dim=1).mean())


def test_training_calls_the_transformer_as_the_pipeline_does(pipe: Any) -> None:
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True
    )
    pipe("a two", generator=torch.Generator().manual_seed(0), **load_config("smoke-flux").call)
    hook.remove()
    assert len(calls) == 8, "two branches in each of four steps"
    mine: dict[str, Any] = {}

    def forward(**kwargs: Any) -> tuple[torch.Tensor]:
        mine.update(kwargs)
        return (kwargs["hidden_states"],)

    first = calls[0]
    noisy = tiny_flux.unpack(first["hidden_states"], 4, 4)
    tiny_flux.velocity(
        forward, noisy, first["timestep"], first["encoder_hidden_states"], first["pooled_projections"]
    )
    assert first["guidance"] is None and not first["joint_attention_kwargs"]
    for key, value in mine.items():
        same = value is first[key] or torch.equal(value, first[key])
        assert same, key


def test_sampling_visits_the_noise_levels_of_training() -> None:
    scheduler = tiny_flux.build_scheduler(3.0)
    steps = torch.linspace(1, 1 / 8, 8)
    scheduler.set_timesteps(sigmas=steps.tolist(), mu=scheduler.config.base_shift)
    torch.testing.assert_close(scheduler.sigmas[:-1], 3 * steps / (1 + 2 * steps))
    assert math.isclose(scheduler.config.base_shift, scheduler.config.max_shift)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_control_with_another_solver_runs(pipe: Any, solver: str) -> None:
    pipe.scheduler = other_scheduler(pipe.scheduler, solver)
    call = load_config("smoke-flux").call | {"num_inference_steps": 3}
    image = pipe("a two", generator=torch.Generator().manual_seed(0), output_type="np", **call).images
    assert image.shape == (1, 16, 16, 3)
    sigmas = pipe.scheduler.sigmas
    assert len(sigmas) == 4 and float(sigmas[0]) > 0.9, "as many steps as asked for, from noise"


# -- the whole recipe -------------------------------------------------------------------------------------------
def test_result_is_an_ordinary_flux_pipeline(pipe: Any) -> None:
    assert type(pipe) is FluxPipeline
    assert pipe.vae.config.shift_factor == 0.0 and pipe.transformer.config.guidance_embeds is False
    image = pipe("a two", output_type="np", **load_config("smoke-flux").call).images
    assert image.shape == (1, 16, 16, 3) and math.isfinite(float(image.sum()))


def test_a_block_starts_as_the_identity_and_training_changes_every_block(trained: Path) -> None:
    c = load_config("smoke-flux").denoiser
    torch.manual_seed(0)
    fresh = tiny.build_denoiser("image", c, 4, 32, 8).state_dict()
    assert not any(
        fresh[name].any() for name in fresh if "norm" in name and "blocks" in name and "linear" in name
    )
    weights = load_file(trained / WEIGHTS)
    assert weights.keys() == fresh.keys()
    for block in ("transformer_blocks.0.", "single_transformer_blocks.0.", "single_transformer_blocks.1."):
        moved = [
            bool(weights[name].any())
            for name in weights
            if name.startswith(block) and name.endswith("linear.weight")
        ]
        assert moved and all(moved), block


def test_interrupted_training_continues_bit_identically(trained: Path, tmp_path: Path) -> None:
    assert run(tmp_path, stop_after=3) == tmp_path / "latest"
    run(tmp_path, resume=True)
    a, b = load_file(trained / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_bundle_writes_card(trained: Path, tmp_path: Path) -> None:
    config = load_config("smoke-flux")
    card = bundle(config, trained, tmp_path / "flux", data="sklearn")
    assert card["pipeline"] == "FluxPipeline" and card["kind"] == "image" and card["call"] == config.call
    assert set(card["parameters"]) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "flux", local_files_only=True)
    assert tiny_models.call_defaults(loaded) == config.call


@pytest.mark.skipif("tiny-image" not in tiny_models.names(), reason="tiny-image is not bundled here")
def test_autoencoder_of_a_bundled_model_is_taken_as_it_is(tmp_path: Path) -> None:
    taken = load_config("smoke-flux").model_dump(mode="json")
    taken["vae"] = {"weights": "tiny-image"}
    taken["denoiser"] = {key: value for key, value in taken["denoiser"].items() if key != "ffn"}
    from hasten.distill.pretrain.config import parse_config

    config = parse_config(taken)
    pretrain(config, out=tmp_path, data="sklearn", progress=False, stop_after=1)
    name = "vae/diffusion_pytorch_model.safetensors"
    a, b = load_file(tiny_models.path("tiny-image") / name), load_file(tmp_path / "latest" / name)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["shift_factor"] == 0.0
    assert not (tmp_path / "checkpoints" / "vae").exists()
    assert bundle(config, tmp_path, tmp_path / "b", source="latest")["steps"]["vae"] == 0
    with pytest.raises(ModelError, match="no bundled model 'tiny-imag'"):
        pretrain(
            parse_config(taken | {"vae": {"weights": "tiny-imag"}}),
            out=tmp_path / "x",
            data="sklearn",
            progress=False,
        )
