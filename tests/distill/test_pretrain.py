"""Moving digits move as told; the recipe trains, resumes bit-identically, and refuses what it cannot honour."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn", reason="scikit-learn's digits are the data of these tests")

from hasten.distill.data.moving_digits import (
    DIRECTIONS,
    POSITIONS,
    SPEEDS,
    TRAVEL,
    Digits,
    load_digits,
    sample_clips,
    sample_images,
)
from hasten.distill.loop.schedule import learning_rate
from hasten.distill.pretrain.bundle import MAX_POINTS, bundle
from hasten.distill.pretrain.config import load_config, parse_config
from hasten.distill.pretrain.pictures import pretrain
from hasten.distill.pretrain.task import step_seed
from hasten.distill.pretrain.tiny import build_denoiser, build_tokenizer, vocabulary
from hasten.distill.pretrain.tiny_attention import BmmAttention
from hasten.distill.pretrain.tiny_growth import grown_weights
from hasten.errors import ResumeError, UsageError

PREFIX = {"video": "blocks.", "image": "transformer_blocks."}
MNIST = Path(__file__).resolve().parents[3] / "shared" / "real" / "mnist"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["sklearn", "mnist"])
def digits(request: pytest.FixtureRequest) -> Digits:
    if request.param == "mnist" and not MNIST.is_dir():
        pytest.skip("the MNIST pictures are not on this machine")
    return load_digits("sklearn" if request.param == "sklearn" else MNIST)


def centres(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre of ink of (n, F, H, W): y and x, each (n, F)."""
    axis = torch.arange(frames.shape[-1], dtype=torch.float32)
    ink = frames.sum((2, 3))
    return (frames.sum(3) * axis).sum(2) / ink, (frames.sum(2) * axis).sum(2) / ink


# -- data -------------------------------------------------------------------------------------------------------
def test_clips_move_as_their_prompt_says(digits: Digits) -> None:
    clips = sample_clips(digits, 128, seed=1)
    y, x = centres(clips.frames)
    sign = {"left": (x, -1), "right": (x, 1), "up": (y, -1), "down": (y, 1)}
    for i, prompt in enumerate(clips.prompts):
        direction, speed = DIRECTIONS[clips.direction[i]], SPEEDS[clips.speed[i]]
        assert direction in prompt and speed in prompt
        axis, forward = sign[direction]
        other = y if axis is x else x
        low, high = TRAVEL[speed]
        travel = float(axis[i, -1] - axis[i, 0]) * forward
        assert low - 0.2 <= travel <= high + 0.2, (prompt, travel)
        assert float((other[i] - other[i, 0]).abs().max()) < 0.05, prompt
        assert bool((axis[i].diff() * forward > 0).all()), "the motion never turns back"


def test_digits_stay_inside_and_keep_their_ink(digits: Digits) -> None:
    clips = sample_clips(digits, 64, seed=2)
    ink = clips.frames.sum((2, 3))
    assert float((ink / ink[:, :1] - 1).abs().max()) < 0.02, "a digit that left the canvas would lose ink"
    assert float(clips.frames.min()) >= 0 and float(clips.frames.max()) <= 1


def test_train_and_test_handwriting_are_disjoint(digits: Digits) -> None:
    assert not set(digits.indices("train")) & set(digits.indices("test"))
    assert len(digits.indices("test")) >= 200


def test_batches_are_functions_of_the_seed(digits: Digits) -> None:
    first, again, other = (sample_clips(digits, 4, seed=s) for s in (7, 7, 8))
    assert torch.equal(first.frames, again.frames) and first.prompts == again.prompts
    assert not torch.equal(first.frames, other.frames)
    assert step_seed(0, "vae", 1) != step_seed(0, "denoiser", 1)


def test_images_sit_where_their_prompt_says(digits: Digits) -> None:
    images = sample_images(digits, 200, seed=3, paraphrase=False)
    y, x = (c[:, 0] - 15.5 for c in centres(images.frames))
    for i, prompt in enumerate(images.prompts):
        where = POSITIONS[images.first[i]]
        assert where in prompt
        if "top" in where or "bottom" in where:
            assert (float(y[i]) > 0) == ("bottom" in where), (prompt, float(y[i]))
            assert (float(x[i]) > 0) == ("right" in where), (prompt, float(x[i]))
    ink = images.frames.mean((1, 2, 3))
    assert float(ink[images.second == 1].mean()) > float(ink[images.second == 0].mean())


def test_missing_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sklearn"):
        load_digits(tmp_path)


def test_every_prompt_word_is_known(digits: Digits) -> None:
    tokenizer, unknown = build_tokenizer(), vocabulary().index("<unk>")
    prompts = sample_clips(digits, 200, seed=4).prompts + sample_images(digits, 200, seed=5).prompts
    ids = tokenizer(prompts).input_ids
    assert all(unknown not in row for row in ids)
    assert max(map(len, ids)) <= 16
    assert (
        tokenizer("A SEVEN moving left,slowly").input_ids
        == tokenizer("a seven moving left, slowly").input_ids
    )
    assert tokenizer("").input_ids == [vocabulary().index("</s>")]


# -- configuration ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tiny-video", "tiny-image", "smoke-video", "smoke-image"])
def test_bundled_configurations_are_valid(name: str) -> None:
    config = load_config(name)
    assert config.name == name and config.call["num_inference_steps"]


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"denoiser\.step'.*'steps'"):
        load_config("smoke-video", {"denoiser.step": 3})
    with pytest.raises(UsageError, match="unknown key 'sed'"):
        parse_config({"name": "x", "kind": "video", "sed": 1})


def test_a_shallow_start_must_be_shallower() -> None:
    with pytest.raises(UsageError, match=r"shallow\.layers must be below layers \(2\), got 2"):
        load_config("smoke-video", {"denoiser.shallow": {"layers": 2, "steps": 1}})
    with pytest.raises(UsageError, match=r"unknown key 'denoiser\.shallow\.layer'.*'layers'"):
        load_config("smoke-video", {"denoiser.shallow": {"layer": 1, "steps": 1}})


def test_wrong_value_and_missing_file_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"denoiser\.batch.*got -1"):
        load_config("smoke-video", {"denoiser.batch": -1})
    with pytest.raises(UsageError, match="tiny-video"):
        load_config(tmp_path / "none.yaml")


def test_learning_rate_warms_up_stays_and_ends_near_zero() -> None:
    rate = [learning_rate(step, 1000, 100, 0.4) for step in range(1000)]
    assert rate[0] == 0.01 and rate[99] == 1.0 and rate[599] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rate[600:]))
    assert 0 < rate[-1] <= 0.0025


# -- attention --------------------------------------------------------------------------------------------------
def test_training_attention_equals_the_fused_one() -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 10, 16, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 3, 10, 16)
    exact = sdpa(*parts)
    gradients = torch.autograd.grad((exact * weight).sum(), parts)
    with BmmAttention():
        ours = sdpa(*parts)
        masked = sdpa(*parts, attn_mask=torch.ones(10, 10, dtype=torch.bool))
    assert ours.dtype == torch.bfloat16 and masked.dtype == torch.float32
    torch.testing.assert_close(ours.float(), exact, atol=2e-2, rtol=2e-2)
    for a, b in zip(torch.autograd.grad((ours.float() * weight).sum(), parts), gradients, strict=True):
        torch.testing.assert_close(a, b, atol=5e-2, rtol=5e-2)


# -- the whole recipe -------------------------------------------------------------------------------------------
def run(kind: str, out: Path, **settings: Any) -> Path:
    return pretrain(load_config(f"smoke-{kind}"), out=out, data="sklearn", progress=False, **settings)


@pytest.fixture(scope="module", params=["video", "image"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param)
    run(request.param, out)
    return request.param, out


def test_result_loads_with_diffusers_alone(trained: tuple[str, Path]) -> None:
    from diffusers import DiffusionPipeline

    kind, out = trained
    pipe = DiffusionPipeline.from_pretrained(out / "pipeline", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    config = load_config(f"smoke-{kind}")
    result = pipe("a seven moving left, slowly", output_type="np", **config.call)
    if kind == "video":
        assert result.frames.shape == (1, 5, 16, 16, 3)
        assert all(math.isfinite(v) and v > 0 for v in pipe.vae.config.latents_std)
    else:
        assert result.images.shape == (1, 16, 16, 3)
        assert pipe.scheduler.config.prediction_type == "epsilon"


def test_log_has_one_line_a_step(trained: tuple[str, Path]) -> None:
    kind, out = trained
    rows = [json.loads(line) for line in (out / "checkpoints" / "denoiser" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(load_config(f"smoke-{kind}").denoiser.steps))
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_interrupted_training_continues_bit_identically(trained: tuple[str, Path], tmp_path: Path) -> None:
    kind, whole = trained
    assert run(kind, tmp_path, stop_after=3) == tmp_path / "latest"
    with (tmp_path / "checkpoints" / "denoiser" / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # what a kill in the next steps leaves behind
    run(kind, tmp_path, resume=True)
    name = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    a, b = load_file(whole / name), load_file(tmp_path / name)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "checkpoints" / "denoiser" / "log.jsonl").read_text().splitlines()]
        for folder in (whole, tmp_path)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_grown_denoiser_begins_as_the_function_it_was_grown_from(kind: str) -> None:
    config = load_config(f"smoke-{kind}").denoiser.model_copy(update={"layers": 2})
    torch.manual_seed(0)
    shallow = build_denoiser(kind, config, 4, 8, 4).eval()
    for parameter in shallow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    deep = build_denoiser(kind, config.model_copy(update={"layers": 5}), 4, 8, 4).eval()
    weights = grown_weights(shallow.state_dict(), 2, 5)
    deep.load_state_dict(weights)
    if kind == "video":
        call = {"hidden_states": torch.randn(1, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 8)}
    else:
        call = {"hidden_states": torch.randn(1, 4, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 8)}
        call["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    call |= {"timestep": torch.tensor([500]), "return_dict": False}
    torch.testing.assert_close(deep(**call)[0], shallow(**call)[0], rtol=1e-5, atol=1e-5)
    assert float(shallow(**call)[0].abs().max()) > 0.01, "an all-zero output would be equal too"
    copied = [bool(weights[f"{PREFIX[kind]}{i}.attn1.to_out.0.weight"].any()) for i in range(5)]
    assert copied == [True, False, False, True, False], "the added blocks are spread and silent"


def test_growing_resumes_in_either_phase(tmp_path: Path) -> None:
    overrides = {"denoiser.layers": 2, "denoiser.shallow": {"layers": 1, "steps": 2}, "denoiser.steps": 2}
    config = load_config("smoke-image", overrides)

    def train(out: Path, **settings: Any) -> Path:
        return pretrain(config, out=out, data="sklearn", progress=False, **settings)

    assert train(tmp_path / "whole") == tmp_path / "whole" / "pipeline"
    for stop in (1, 3):
        assert train(tmp_path / "parts", stop_after=stop, resume=stop > 1) == tmp_path / "parts" / "latest"
    train(tmp_path / "parts", resume=True)
    name = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert json.loads((tmp_path / "parts" / "pipeline" / "training.json").read_text())["step"] == 4


def test_resume_refuses_an_incomplete_checkpoint_or_another_configuration(tmp_path: Path) -> None:
    run("image", tmp_path, stop_after=2)
    with pytest.raises(UsageError, match="already holds a training"):
        run("image", tmp_path)
    changed = load_config("smoke-image", {"denoiser.batch": 5})
    with pytest.raises(ResumeError, match=r"denoiser\.batch was 4, now 5"):
        pretrain(changed, out=tmp_path, data="sklearn", resume=True, progress=False)
    (tmp_path / "checkpoints" / "denoiser" / "latest" / "student" / "optimizer.safetensors").unlink()
    with pytest.raises(ResumeError, match=r"student/optimizer\.safetensors is missing"):
        run("image", tmp_path, resume=True)
    with pytest.raises(ResumeError, match="no such folder"):
        run("image", tmp_path / "elsewhere", resume=True)


def test_bundle_writes_card_and_curve(trained: tuple[str, Path], tmp_path: Path) -> None:
    kind, out = trained
    config = load_config(f"smoke-{kind}")
    card = bundle(config, out, tmp_path / config.name, data="sklearn")
    assert card["call"] == config.call and card["seed"] == config.seed and "scikit-learn" in card["data"]
    assert set(card["sha256"]) == {
        str(file.relative_to(tmp_path / config.name))
        for file in (tmp_path / config.name).rglob("*.safetensors")
    }
    stored = load_file(tmp_path / config.name / "transformer" / "diffusion_pytorch_model.safetensors")
    own = load_file(out / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == own.keys() and all(torch.equal(stored[key], own[key].half()) for key in own)
    assert not [file for file in (tmp_path / config.name).rglob("*.json") if str(out) in file.read_text()]
    curves = json.loads((tmp_path / config.name / "loss.json").read_text())
    assert set(curves) == {"vae", "denoiser"} and all(0 < len(c) <= MAX_POINTS for c in curves.values())
    with pytest.raises(UsageError, match="No pipeline"):
        bundle(config, tmp_path / "nowhere", tmp_path / "x")
