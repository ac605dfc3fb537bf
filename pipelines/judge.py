"""Reads generated clips and images of moving digits: an absolute measure beside similarity to a reference run.

`Judge.load().read(frames)` says which digit a clip shows, where it moves and how fast. Accuracy alone is fooled by
class means, so `frechet` (https://arxiv.org/abs/1706.08500) and `recall` (Kynkaanniemi et al.,
https://arxiv.org/abs/1904.06991) compare the judge's features with those of unseen real clips, of which a small
reference set is stored beside the weights. The network is trained by `hasten.distill.pretrain.judge`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import ModelError, UsageError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")

_SIZE = 32
_FRAMES = 17
_FOLDER = Path(__file__).parent / "bundled" / "judge"


class JudgeNet(nn.Module):
    """A per-frame reader of digits and an early-fusion reader of motion.

    `digit_features`: (n, 1, 32, 32) -> (n, 48); `motion_features`: (n, 17, 32, 32) -> (n, 16). Pixels in [0, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, stride=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.GELU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 16, 48), nn.GELU(),
        )  # fmt: skip
        self.digit = nn.Linear(48, len(DIGITS))
        self.motion = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(_FRAMES, 32, 3, padding=1, stride=2), nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.GELU(),
            nn.Flatten(), nn.Linear(32 * 16, 16), nn.GELU(),
        )  # fmt: skip
        self.direction = nn.Linear(16, len(DIRECTIONS))
        self.speed = nn.Linear(16, len(SPEEDS))

    def digit_features(self, frames: Tensor) -> Tensor:
        """Features of single frames."""
        features: Tensor = self.frame(frames - 0.1)
        return features

    def motion_features(self, clips: Tensor) -> Tensor:
        """Features of whole clips, the frames taken as channels."""
        features: Tensor = self.motion(clips - 0.1)
        return features


@dataclass(frozen=True)
class Reading:
    """What the judge saw. `direction` and `speed` are None for a single image."""

    digit: int
    direction: str | None
    speed: str | None
    confidence: float
    features: Tensor


class Judge:
    """The trained reader with its reference features of unseen real clips and images."""

    def __init__(self, net: JudgeNet, reference: dict[str, Tensor], card: dict[str, Any]) -> None:
        self.net, self.reference, self.card = net.eval().requires_grad_(False), reference, card

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Judge:
        """The bundled judge, or one trained by `hasten.distill.pretrain.judge` into `folder`."""
        if folder is None:
            return _bundled()
        from safetensors.torch import load_file

        folder = Path(folder)
        files = [folder / name for name in ("judge.safetensors", "reference.safetensors", "judge.json")]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(
                f"no judge in '{folder}': missing {', '.join(missing)}. Train one with hasten.distill.pretrain.judge."
            )
        net = JudgeNet()
        net.load_state_dict(load_file(files[0]))
        return cls(net, load_file(files[1]), json.loads(files[2].read_text()))

    @torch.no_grad()
    def read(self, frames: Any) -> Reading:
        """Read a clip (F, H, W, 3) or an image (H, W, 3): array or tensor in [0, 1] or 0..255, or PIL image(s)."""
        clip = as_clip(frames)
        hidden = self.net.digit_features(clip.unsqueeze(1)).mean(0)
        digit = self.net.digit(hidden).softmax(-1)
        if len(clip) == 1:
            return Reading(int(digit.argmax()), None, None, float(digit.max()), hidden)
        motion = self.net.motion_features(_in_time(clip).unsqueeze(0))[0]
        direction = self.net.direction(motion).softmax(-1)
        return Reading(
            int(digit.argmax()),
            DIRECTIONS[int(direction.argmax())],
            SPEEDS[int(self.net.speed(motion).argmax())],
            float(digit.max() * direction.max()),
            torch.cat([hidden, motion]),
        )

    def read_all(self, videos: Iterable[Any]) -> list[Reading]:
        """Read several clips or images."""
        return [self.read(video) for video in videos]

    def prompt_accuracy(self, videos: Sequence[Any], prompts: Sequence[str]) -> dict[str, float]:
        """Share of clips that show what their prompt says: digit, direction, speed (where told) and all of it."""
        if len(videos) != len(prompts):
            raise UsageError(f"{len(videos)} videos for {len(prompts)} prompts: give one prompt a video.")
        return accuracy(self.read_all(videos), prompts)

    def features(self, videos: Iterable[Any]) -> Tensor:
        """(n, d) features: d = 64 for clips, 48 for images."""
        return torch.stack([reading.features for reading in self.read_all(videos)])

    def reference_features(self, kind: str = "video") -> Tensor:
        """Features of unseen real clips ("video") or images ("image"), (512, d) float32."""
        return self.reference[f"{kind}.features"].float()

    def frechet_to_real(self, features: Tensor, kind: str = "video") -> float:
        """Frechet distance of generated features to the stored real ones."""
        mean, cov = self.reference[f"{kind}.mean"], self.reference[f"{kind}.cov"]
        return _frechet(mean.double(), cov.double(), *_moments(features))


@functools.lru_cache(maxsize=1)
def _bundled() -> Judge:
    return Judge.load(_FOLDER)


def prompt_accuracy(videos: Sequence[Any], prompts: Sequence[str]) -> dict[str, float]:
    """`Judge.prompt_accuracy` of the bundled judge."""
    return Judge.load().prompt_accuracy(videos, prompts)


def accuracy(readings: Sequence[Reading], prompts: Sequence[str]) -> dict[str, float]:
    """Share of readings that agree with their prompts, per attribute the prompts name, and `all` together."""
    hits: dict[str, list[bool]] = {}
    for reading, prompt in zip(readings, prompts, strict=True):
        told = parse_prompt(prompt)
        seen = {"digit": reading.digit, "direction": reading.direction, "speed": reading.speed}
        agree = {key: seen[key] == value for key, value in told.items() if seen[key] is not None}
        for key, hit in agree.items():
            hits.setdefault(key, []).append(hit)
        hits.setdefault("all", []).append(all(agree.values()))
    return {key: sum(values) / len(values) for key, values in hits.items()}


def in_words(frames: Any, prompt: str) -> dict[str, Any]:
    """What the judge sees, as two keys of a row: `reads` ("seven left slowly") and `prompt_accuracy` (1.0 where the prompt says so).
    Empty for a prompt without a digit, and where there is no judge."""
    try:
        seen, told = Judge.load().read(frames), parse_prompt(prompt)
    except (FileNotFoundError, ValueError):
        return {}
    words = " ".join(str(word) for word in (DIGITS[seen.digit], seen.direction, seen.speed) if word)
    found = {"digit": seen.digit, "direction": seen.direction, "speed": seen.speed}
    return {"reads": words, "prompt_accuracy": float(all(found[key] == value for key, value in told.items()))}


def parse_prompt(prompt: str) -> dict[str, int | str]:
    """The digit, direction and speed that a prompt names ("a seven moving left, slowly")."""
    words = re.findall(r"[a-z]+|\d", prompt.lower())
    told: dict[str, int | str] = {}
    for word in words:
        if word in DIGITS or word.isdigit():
            told.setdefault("digit", DIGITS.index(word) if word in DIGITS else int(word))
        elif word in SPEEDS:
            told.setdefault("speed", word)
    moves = bool({"moving", "moves", "going", "goes"} & set(words))
    for word in words if moves else ():
        if word in DIRECTIONS:
            told.setdefault("direction", word)
    if "digit" not in told:
        raise UsageError(f"the prompt {prompt!r} names no digit: use a word such as 'seven' or a numeral.")
    return told


def as_clip(frames: Any) -> Tensor:
    """Any clip or image as a grey tensor (F, 32, 32) in [0, 1]; F = 1 for an image."""
    if isinstance(frames, (list, tuple)):
        parts = [as_clip(frame) for frame in frames]
        return torch.cat(parts)
    if not isinstance(frames, Tensor):
        import numpy as np

        frames = torch.from_numpy(np.array(frames))
    clip = frames.detach().float().cpu() / (255.0 if frames.dtype == torch.uint8 else 1.0)
    if clip.ndim == 3 and clip.shape[-1] == 3:
        clip = clip.unsqueeze(0)
    elif clip.ndim == 2:
        clip = clip[None, :, :, None]
    if clip.ndim != 4 or clip.shape[-1] not in (1, 3):
        raise UsageError(
            f"cannot read frames of shape {tuple(frames.shape)}: expected a clip (F, H, W, 3) or an image (H, W, 3)."
        )
    grey: Tensor = clip.mean(-1).clamp(0, 1)
    if grey.shape[-2:] != (_SIZE, _SIZE):
        grey = F.interpolate(grey.unsqueeze(1), (_SIZE, _SIZE), mode="area").squeeze(1)
    return grey


def _in_time(clip: Tensor) -> Tensor:
    """Resample (F, H, W) to the 17 frames of the motion reader."""
    if len(clip) == _FRAMES:
        return clip
    return clip[torch.linspace(0, len(clip) - 1, _FRAMES).round().long()]


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or len(features) < 2:
        raise UsageError(f"features of shape {tuple(features.shape)}: expected (n, d) with n >= 2.")
    features = features.double()
    return features.mean(0), features.T.cov()


def _frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance between two feature sets (n, d), (m, d); biased upwards for few samples."""
    return _frechet(*_moments(features_a), *_moments(features_b))


def recall(features_real: Tensor, features_fake: Tensor, k: int = 3) -> float:
    """Share of real features inside the fake manifold: within the k-th neighbour's radius of some fake feature."""
    if len(features_fake) <= k:
        raise UsageError(
            f"recall with k={k} needs more than {k} generated features, got {len(features_fake)}."
        )
    fake, real = features_fake.float(), features_real.float()
    radius = torch.cdist(fake, fake).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    return float((torch.cdist(real, fake) <= radius).any(1).float().mean())


def precision(features_real: Tensor, features_fake: Tensor, k: int = 3) -> float:
    """Share of fake features inside the real manifold."""
    return recall(features_fake, features_real, k)
