"""Train the judge of `hasten.pipelines.judge` on real moving digits, and measure it on unseen handwriting.

Besides clean clips it sees blurred, noisy and dimmed ones and, where autoencoders are given, their reconstructions,
so that it does not trip over the artefacts of a generator. The stored reference features come from test handwriting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hasten.distill.data import moving_digits
from hasten.distill.loop.schedule import learning_rate
from hasten.distill.loop.state import replace_folder
from hasten.distill.pretrain.config import find_config
from hasten.distill.pretrain.task import step_seed
from hasten.pipelines.judge import JudgeNet


class JudgeConfig(BaseModel):
    """How the judge is trained; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 5
    steps: PositiveInt = 2500
    batch: PositiveInt = 64
    frames_per_clip: PositiveInt = 3
    lr: PositiveFloat = 3e-3
    reconstructed: PositiveInt = 1024
    """Clips (and as many images) passed through each autoencoder once, mixed into a quarter of the batches."""
    test_clips: PositiveInt = 3000
    reference: PositiveInt = 512


def load_judge_config(path: str | Path = "judge") -> JudgeConfig:
    """Read a YAML file, or the bundled configuration of that name."""
    return JudgeConfig.model_validate(yaml.safe_load(find_config(path).read_text()))


def train_judge(
    config: JudgeConfig,
    *,
    out: Path,
    data: str,
    autoencoders: tuple[Path, ...] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Train on `data` (an MNIST folder or `sklearn`), write the judge's folder, return its card with accuracies.

    `autoencoders` are folders of AutoencoderKLWan or AutoencoderKL whose reconstructions are mixed in.
    """
    digits = moving_digits.load_digits(data)
    torch.manual_seed(config.seed)
    net = JudgeNet()
    extra = [_reconstructed(folder, digits, config) for folder in autoencoders]
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=0.02)
    for step in tqdm(range(config.steps), desc="judge", disable=not progress, mininterval=5):
        optimizer.param_groups[0]["lr"] = config.lr * learning_rate(step, config.steps, 100, 0.8)
        loss = _loss(net, _batch(digits, extra, config, step), config, step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    net.eval().requires_grad_(False)
    card = {
        "config": config.model_dump(),
        "data": digits.source,
        "licence": "Apache-2.0",
        "accuracy": measure(net, digits, config),
        "final_loss": float(loss.detach()),
    }
    reference = _reference(net, digits, config)

    def write(part: Path) -> None:
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, part / "judge.safetensors")
        save_file(reference, part / "reference.safetensors")
        (part / "judge.json").write_text(json.dumps(card, indent=1) + "\n")

    replace_folder(Path(out), write)
    return card


def _batch(
    digits: moving_digits.Digits, extra: list[moving_digits.Clips], config: JudgeConfig, step: int
) -> moving_digits.Clips:
    """Fresh clips, or a quarter of the time reconstructed ones."""
    seed = step_seed(config.seed, "judge", step)
    if not extra or step % 4:
        make = moving_digits.sample_clips if step % 8 < 6 else moving_digits.sample_images
        return make(digits, config.batch, seed)
    pool = extra[step // 4 % len(extra)]
    pick = torch.randint(len(pool.digit), (config.batch,), generator=torch.Generator().manual_seed(seed))
    return moving_digits.Clips(pool.frames[pick], [], pool.digit[pick], pool.first[pick], pool.second[pick])


def _loss(net: JudgeNet, clips: moving_digits.Clips, config: JudgeConfig, step: int) -> Tensor:
    g = torch.Generator().manual_seed(step_seed(config.seed, "augment", step))
    frames = augment(clips.frames, g)
    count = frames.shape[1]
    picked = frames[:, torch.randperm(count, generator=g)[: config.frames_per_clip]]
    logits = net.digit(net.digit_features(picked.flatten(0, 1).unsqueeze(1)))
    loss = F.cross_entropy(logits, clips.digit.repeat_interleave(picked.shape[1]), label_smoothing=0.02)
    if count > 1:
        motion = net.motion_features(frames)
        loss = loss + F.cross_entropy(net.direction(motion), clips.direction)
        loss = loss + F.cross_entropy(net.speed(motion), clips.speed)
    return loss


def augment(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, dim and add noise to (n, F, H, W) clips, differently for each clip."""
    n = len(frames)
    amount = torch.rand(n, 3, 1, 1, 1, generator=generator)
    kernel = torch.tensor([0.25, 0.5, 0.25])
    flat = frames.reshape(-1, 1, *frames.shape[2:])
    blurred = F.conv2d(
        F.conv2d(flat, kernel.view(1, 1, 3, 1), padding=(1, 0)), kernel.view(1, 1, 1, 3), padding=(0, 1)
    )
    blur = (amount[:, 0] - 0.4).clamp_min(0) / 0.6
    mixed = torch.lerp(frames, blurred.view_as(frames), blur)
    noise = torch.randn(frames.shape, generator=generator) * 0.08 * (amount[:, 2] - 0.3).clamp_min(0)
    return (mixed * (0.8 + 0.3 * amount[:, 1]) + noise).clamp(0, 1)


@torch.no_grad()
def _reconstructed(folder: Path, digits: moving_digits.Digits, config: JudgeConfig) -> moving_digits.Clips:
    import diffusers

    library: Any = diffusers
    video = json.loads((Path(folder) / "config.json").read_text())["_class_name"] == "AutoencoderKLWan"
    vae = (library.AutoencoderKLWan if video else library.AutoencoderKL).from_pretrained(folder)
    make = moving_digits.sample_clips if video else moving_digits.sample_images
    clips = make(digits, config.reconstructed, step_seed(config.seed, "reconstructed", 0))
    rgb = clips.rgb() if video else clips.rgb().squeeze(2)
    parts = [vae.decode(vae.encode(x).latent_dist.sample()).sample.mean(1) for x in torch.split(rgb, 32)]
    frames = ((torch.cat(parts) + 1) / 2).clamp(0, 1)
    return moving_digits.Clips(
        frames if video else frames.unsqueeze(1), clips.prompts, clips.digit, clips.first, clips.second
    )


@torch.no_grad()
def measure(net: JudgeNet, digits: moving_digits.Digits, config: JudgeConfig) -> dict[str, float]:
    """Accuracy on clips and single images of unseen handwriting."""
    clips = moving_digits.sample_clips(digits, config.test_clips, 10**6, split="test")
    hidden, motion = _features(net, clips.frames)
    images = moving_digits.sample_images(digits, config.test_clips, 10**6 + 1, split="test")
    single = net.digit(net.digit_features(images.frames)).argmax(-1)
    rows = {
        "digit": net.digit(hidden).argmax(-1) == clips.digit,
        "direction": net.direction(motion).argmax(-1) == clips.direction,
        "speed": net.speed(motion).argmax(-1) == clips.speed,
        "image_digit": single == images.digit,
    }
    return {name: round(float(hit.float().mean()), 4) for name, hit in rows.items()}


def _features(net: JudgeNet, frames: Tensor) -> tuple[Tensor, Tensor]:
    hidden = [
        net.digit_features(part.flatten(0, 1).unsqueeze(1)).view(len(part), part.shape[1], -1).mean(1)
        for part in torch.split(frames, 128)
    ]
    return torch.cat(hidden), net.motion_features(frames)


@torch.no_grad()
def _reference(net: JudgeNet, digits: moving_digits.Digits, config: JudgeConfig) -> dict[str, Tensor]:
    clips = moving_digits.sample_clips(digits, 4 * config.reference, 10**6 + 2, split="test")
    images = moving_digits.sample_images(digits, 4 * config.reference, 10**6 + 3, split="test")
    rows = {
        "video": torch.cat(_features(net, clips.frames), 1),
        "image": net.digit_features(images.frames),
    }
    stored: dict[str, Tensor] = {}
    for kind, features in rows.items():
        stored[f"{kind}.features"] = features[: config.reference].half()
        stored[f"{kind}.mean"] = features.mean(0)
        stored[f"{kind}.cov"] = features.T.cov()
    return stored
