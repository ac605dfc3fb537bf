"""Handwritten digits that move on a black canvas: the data the bundled tiny models learn.

Two sources of handwriting, chosen by `load_digits`:

* a folder with MNIST as published in karpathy/convnetjs: `mnist_batch_<k>.png` (3000 rows, one 28x28 digit
  a row) and `labels.txt` (one digit a line, batch 0 first); the first 60,000 digits are the training set;
* the word `sklearn`: the 1,797 8x8 digits that ship with scikit-learn (no files, no network).

Training and test *handwriting* are disjoint, so whatever judges a generated clip was tested on unseen digits.
Every batch is a pure function of (digits, split, seed): nothing here keeps a state, which is what makes an
interrupted training continue bit-exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.pipelines.judge import DIGITS, DIRECTIONS, SPEEDS

Split = Literal["train", "test"]

POSITIONS = ("top left", "top right", "bottom left", "bottom right", "center")
STROKES = ("thin", "thick")

TRAVEL = {"slowly": (4.5, 5.5), "quickly": (10.5, 11.5)}
"""Pixels travelled over a clip (lowest, highest), on a 32-pixel canvas with a 20-pixel digit."""

_VIDEO_TEMPLATES = (
    "a {digit} moving {direction}, {speed}",
    "a {digit} moves {direction} {speed}",
    "the digit {digit} moving {direction}, {speed}",
    "a {digit} is {speed} going {direction}",
)
_UNIT = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}  # (dy, dx)
_CORNER = {
    "top left": (0.0, 0.0),
    "top right": (0.0, 1.0),
    "bottom left": (1.0, 0.0),
    "bottom right": (1.0, 1.0),
    "center": (0.5, 0.5),
}


@dataclass(frozen=True)
class Digits:
    """Handwriting: `images` (N, 28, 28) uint8 with ink = 255, `labels` (N,) int64, first `train` are training."""

    images: Tensor
    labels: Tensor
    train: int
    source: str

    def indices(self, split: Split) -> range:
        """Row numbers of a split."""
        return range(self.train) if split == "train" else range(self.train, len(self.labels))


@dataclass(frozen=True)
class Clips:
    """Rendered clips or images with what they show.

    frames: (n, F, H, W) float32 in [0, 1]; F = 1 for images. The label tensors are (n,) int64 indices into
    `DIGITS`, `DIRECTIONS`, `SPEEDS` (clips) or `POSITIONS`, `STROKES` (images).
    """

    frames: Tensor
    prompts: list[str]
    digit: Tensor
    first: Tensor
    second: Tensor

    @property
    def direction(self) -> Tensor:
        """Index into `DIRECTIONS` (clips)."""
        return self.first

    @property
    def speed(self) -> Tensor:
        """Index into `SPEEDS` (clips)."""
        return self.second

    def rgb(self) -> Tensor:
        """The frames as a video tensor (n, 3, F, H, W) in [-1, 1], the range of diffusers' autoencoders."""
        return (self.frames * 2 - 1).unsqueeze(1).expand(-1, 3, -1, -1, -1).contiguous()


def load_digits(data: str | Path) -> Digits:
    """Read the handwriting: a folder with the MNIST pictures, or the word `sklearn`."""
    return _load_sklearn() if str(data) == "sklearn" else _load_mnist(Path(data))


def _load_mnist(folder: Path) -> Digits:
    from PIL import Image

    labels_file = folder / "labels.txt"
    batches = sorted(folder.glob("mnist_batch_*.png"), key=lambda p: int(p.stem.rsplit("_", 1)[1]))
    if not labels_file.is_file() or not batches:
        raise UsageError(
            f"no digits in '{folder}': expected labels.txt and mnist_batch_0.png, mnist_batch_1.png, ... "
            "(MNIST as in karpathy/convnetjs). Give such a folder, or 'sklearn' for scikit-learn's own digits."
        )
    rows = [np.asarray(Image.open(p).convert("L")).reshape(-1, 28, 28) for p in batches]
    images = torch.from_numpy(np.concatenate(rows))
    labels = torch.tensor([int(line) for line in labels_file.read_text().split()[: len(images)]])
    if len(labels) < len(images):
        raise UsageError(
            f"'{labels_file}' holds {len(labels)} labels for {len(images)} digits: expected one a digit. "
            "Take labels.txt from the same release as the pictures."
        )
    train = min(60_000, len(images) * 20 // 21)
    return Digits(images, labels, train, "MNIST (LeCun, Cortes, Burges), CC BY-SA 3.0")


def _load_sklearn() -> Digits:
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise UsageError(
            "data 'sklearn' needs scikit-learn, which is not installed: pip install scikit-learn, or give a "
            "folder with MNIST instead."
        ) from error
    raw = bundled()
    small = torch.from_numpy(np.asarray(raw.images, dtype=np.float32)).unsqueeze(1) / 16
    big = torch.nn.functional.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    big = torch.nn.functional.pad(big, (4, 4, 4, 4)).squeeze(1)
    labels = torch.from_numpy(np.asarray(raw.target, dtype=np.int64))
    return Digits((big * 255).round().to(torch.uint8), labels, 1500, "scikit-learn digits, BSD-3-Clause")


def _draw(generator: torch.Generator, high: int, n: int) -> Tensor:
    return torch.randint(high, (n,), generator=generator)


def _uniform(generator: torch.Generator, low: Tensor | float, high: Tensor | float, n: int) -> Tensor:
    return low + (torch.as_tensor(high) - low) * torch.rand(n, generator=generator)


def _pick(
    digits: Digits, split: Split, n: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """n random digits of a split, area-resized to size x size, in [0, 1]; their labels."""
    rows = digits.indices(split)
    index = _draw(generator, len(rows), n) + rows.start
    glyphs = digits.images[index].float().unsqueeze(1) / 255
    return torch.nn.functional.interpolate(glyphs, size=(size, size), mode="area").squeeze(1), digits.labels[
        index
    ]


def _placement(offset: Tensor, canvas: int, size: int) -> Tensor:
    """Bilinear shift as a matrix: offset (...) in pixels -> (..., canvas, size)."""
    pixel = torch.arange(canvas, dtype=torch.float32).view(canvas, 1)
    source = torch.arange(size, dtype=torch.float32).view(1, size)
    return (1 - (pixel - source - offset[..., None, None]).abs()).clamp_min(0)


def render(glyphs: Tensor, top: Tensor, left: Tensor, canvas: int) -> Tensor:
    """Place glyphs (n, s, s) at sub-pixel positions top, left (n, F): frames (n, F, canvas, canvas)."""
    size = glyphs.shape[-1]
    rows, columns = _placement(top, canvas, size), _placement(left, canvas, size)
    return torch.einsum("nfys,nst,nfxt->nfyx", rows, glyphs, columns).clamp(0, 1)


def clip_prompt(digit: int, direction: int, speed: int, template: int = 0, numeral: bool = False) -> str:
    """The sentence for a clip; template 0 is the usual one ("a seven moving left, slowly")."""
    return _VIDEO_TEMPLATES[template].format(
        digit=str(digit) if numeral else DIGITS[digit], direction=DIRECTIONS[direction], speed=SPEEDS[speed]
    )


def image_prompt(
    digit: int, position: int | None = None, stroke: int | None = None, numeral: bool = False
) -> str:
    """The sentence for an image: "a seven", "a thick seven at the top left"."""
    style = "" if stroke is None else STROKES[stroke] + " "
    where = "" if position is None else " at the " + POSITIONS[position]
    return f"a {style}{digit if numeral else DIGITS[digit]}{where}"


def sample_clips(
    digits: Digits,
    n: int,
    seed: int,
    *,
    split: Split = "train",
    frames: int = 17,
    canvas: int = 32,
    size: int = 20,
    paraphrase: bool = True,
) -> Clips:
    """n random clips: one digit travelling straight at constant speed, always inside the canvas."""
    g = torch.Generator().manual_seed(seed)
    glyphs, labels = _pick(digits, split, n, size, g)
    direction, speed = _draw(g, 4, n), _draw(g, 2, n)
    low = torch.tensor([TRAVEL[s][0] for s in SPEEDS])[speed]
    high = torch.tensor([TRAVEL[s][1] for s in SPEEDS])[speed]
    room = float(canvas - size)
    travel = _uniform(g, low, high, n) * (room / 12)
    unit = torch.tensor([_UNIT[d] for d in DIRECTIONS])[direction]  # (n, 2)
    free = _uniform(g, 0.0, room, n)
    start_along = _uniform(g, 0.0, 1.0, n) * (room - travel)
    step = torch.linspace(0, 1, frames)
    forward = start_along[:, None] + travel[:, None] * step
    along = torch.where(unit.sum(1, keepdim=True) > 0, forward, room - forward)
    across = free[:, None].expand(-1, frames)
    vertical = (unit[:, :1] != 0).expand(-1, frames)
    pictures = render(
        glyphs, torch.where(vertical, along, across), torch.where(vertical, across, along), canvas
    )
    template = torch.where(torch.rand(n, generator=g) < 0.75, torch.zeros(n).long(), 1 + _draw(g, 3, n))
    numeral = torch.rand(n, generator=g) < 0.15
    prompts = [
        clip_prompt(int(d), int(w), int(s), int(t) if paraphrase else 0, bool(m) and paraphrase)
        for d, w, s, t, m in zip(labels, direction, speed, template, numeral, strict=True)
    ]
    return Clips(pictures, prompts, labels, direction, speed)


def sample_images(
    digits: Digits,
    n: int,
    seed: int,
    *,
    split: Split = "train",
    canvas: int = 32,
    size: int = 20,
    paraphrase: bool = True,
) -> Clips:
    """n random images (frames (n, 1, H, W)): one digit in a corner or the centre, told thin or thick by its ink."""
    g = torch.Generator().manual_seed(seed)
    glyphs, labels = _pick(digits, split, n, size, g)
    position = _draw(g, len(POSITIONS), n)
    room = float(canvas - size)
    corner = torch.tensor([_CORNER[p] for p in POSITIONS])[position] * (room - 2)
    place = corner + 2 * torch.rand(n, 2, generator=g)
    pictures = render(glyphs, place[:, :1], place[:, 1:], canvas)
    ink = glyphs.mean((1, 2))
    stroke = (ink > _ink_median(digits, size)).long()
    told_stroke, told_place = torch.rand(n, generator=g) < 0.5, torch.rand(n, generator=g) < 0.8
    numeral = torch.rand(n, generator=g) < 0.15
    prompts = [
        image_prompt(
            int(d),
            int(p) if bool(tp) or not paraphrase else None,
            int(s) if bool(ts) or not paraphrase else None,
            bool(m) and paraphrase,
        )
        for d, p, s, tp, ts, m in zip(labels, position, stroke, told_place, told_stroke, numeral, strict=True)
    ]
    return Clips(pictures, prompts, labels, position, stroke)


def _ink_median(digits: Digits, size: int) -> float:
    """The ink (mean brightness) that separates thin from thick handwriting, over the first 1,000 digits."""
    glyphs = digits.images[:1000].float().unsqueeze(1) / 255
    small = torch.nn.functional.interpolate(glyphs, size=(size, size), mode="area")
    return float(small.mean((1, 2, 3)).median())
