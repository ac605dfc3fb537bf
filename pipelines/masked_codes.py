"""Images as tokens: a codebook of patches, and what the numbers of a masked image model's vocabulary mean.

Shapes: n images of S x S grey pixels in [0, 1], cut into L = (S / p)^2 patches of p x p, row by row; K codes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import ModelError, UsageError
from hasten.pipelines import tiny_models

FILE = "codebook.safetensors"


@dataclass(frozen=True, slots=True)
class Words:
    """The vocabulary: the codes first, then a token for each class, one for no class, and the mask. names: of the classes."""

    codes: int
    classes: int
    names: tuple[str, ...] = ()

    @property
    def nothing(self) -> int:
        """The class token of an image whose class is not told."""
        return self.codes + self.classes

    @property
    def mask(self) -> int:
        """Not written yet."""
        return self.codes + self.classes + 1

    @property
    def size(self) -> int:
        """All tokens."""
        return self.codes + self.classes + 2

    def class_of(self, prompt: str) -> int:
        """The class that a prompt names with a word ("a seven") or a numeral ("7"), the first of them.

        Raises `UsageError` where it names none.
        """
        for word in re.findall(r"[a-z]+|\d+", prompt.lower()):
            if word in self.names:
                return self.names.index(word)
            if word.isdigit() and int(word) < self.classes:
                return int(word)
        known = f" or a word: {', '.join(self.names)}" if self.names else ""
        raise UsageError(f"The prompt {prompt!r} names no class. Write a number from 0 to {self.classes - 1}{known}.")

    @property
    def never(self) -> tuple[int, ...]:
        """Tokens that no slot of an image may get."""
        return tuple(range(self.codes, self.size))


def is_masked_image(name_or_path: str | Path) -> bool:
    """Is it a masked image model: a bundled one, or a folder with a codebook? A look at the disk, nothing is loaded."""
    return (config := _config_beside_codes(name_or_path)) is not None and '"mask_token_id"' in config


def is_token_image(name_or_path: str | Path) -> bool:
    """The same for a causal model of image tokens, which writes them row by row."""
    return (config := _config_beside_codes(name_or_path)) is not None and '"mask_token_id"' not in config


def _config_beside_codes(name_or_path: str | Path) -> str | None:
    """The text of the model's config.json; None where no codebook is beside it."""
    known = tiny_models.names()
    folder = tiny_models.path(str(name_or_path)) if str(name_or_path) in known else Path(name_or_path).expanduser()
    file = folder / "config.json"
    return file.read_text(encoding="utf-8", errors="replace") if (folder / FILE).is_file() and file.is_file() else None


class Codebook:
    """patches float32 [K, p * p]: what each code looks like. side: S."""

    def __init__(self, patches: Tensor, side: int) -> None:
        self.patches, self.side = patches, side
        self.patch: int = round(patches.shape[1] ** 0.5)
        if self.patch**2 != patches.shape[1] or side % self.patch:
            raise ModelError(
                f"A codebook of {patches.shape[1]} pixels a patch does not fit images of {side} x {side}: it takes square"
                " patches whose side divides the image's."
            )

    @property
    def slots(self) -> int:
        """L."""
        across: int = self.side // self.patch
        return across * across

    def encode(self, images: Tensor) -> Tensor:
        """The nearest code of each patch: [n, S, S] to int64 [n, L]. Raises `UsageError` for another size."""
        if images.ndim != 3 or images.shape[1:] != (self.side, self.side):
            raise UsageError(f"images must be [n, {self.side}, {self.side}], got {list(images.shape)}.")
        cut = cut_patches(images, self.patch)
        return torch.cat([nearest(part.flatten(0, 1), self.patches) for part in torch.split(cut, 512)]).view(len(images), -1)

    def decode(self, codes: Tensor) -> Tensor:
        """The patches of int64 [n, L], put together: float32 [n, S, S]. Raises `UsageError` for other numbers of slots."""
        if codes.ndim != 2 or codes.shape[1] != self.slots:
            raise UsageError(f"codes must be [n, {self.slots}], got {list(codes.shape)}.")
        flat = self.patches.to(codes.device)[codes].transpose(1, 2)
        return F.fold(flat, (self.side, self.side), self.patch, stride=self.patch)[:, 0]

    @classmethod
    def fit(cls, images: Tensor, count: int, patch: int, sample: int, rounds: int, generator: torch.Generator) -> Self:
        """K-means (Lloyd) on `sample` patches of [n, S, S] that are not blank; the first code is the blank patch.

        Raises `UsageError` with fewer such patches than codes.
        """
        rows = cut_patches(images, patch).flatten(0, 1)
        rows = rows[rows.amax(1) > 0.02]
        rows = rows[torch.randperm(len(rows), generator=generator)[:sample]]
        if len(rows) < count:
            raise UsageError(f"{count} codes from {len(rows)} patches that are not blank: give more images or take fewer codes.")
        centres = torch.cat([torch.zeros(1, rows.shape[1]), rows[: count - 1]])
        for _ in range(rounds):
            mine = nearest(rows, centres)
            number = torch.bincount(mine, minlength=count)[:, None]
            sums = torch.zeros_like(centres).index_add_(0, mine, rows)
            centres = torch.where(number > 0, sums / number.clamp(min=1), centres)
            centres[0] = 0
        return cls(centres, images.shape[-1])

    def save(self, folder: Path) -> None:
        """Into `codebook.safetensors`."""
        from safetensors.torch import save_file

        save_file({"patches": self.patches.contiguous(), "side": torch.tensor(self.side)}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From `codebook.safetensors`. Raises `ModelError` where there is none."""
        from safetensors.torch import load_file

        if not (folder / FILE).is_file():
            raise ModelError(f"'{folder}' has no {FILE}: it is no masked image model of ours. Train one with tiny-mask.")
        stored = load_file(folder / FILE)
        return cls(stored["patches"], int(stored["side"]))


def cut_patches(images: Tensor, patch: int) -> Tensor:
    """[n, S, S] to [n, L, p * p]."""
    return F.unfold(images[:, None], patch, stride=patch).transpose(1, 2)


def nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """The centre with the least squared distance: [r, d] and [K, d] to int64 [r]."""
    return (centres.square().sum(1) - 2 * rows @ centres.T).argmin(1)
