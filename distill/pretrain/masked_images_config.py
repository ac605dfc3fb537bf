"""The configuration of a masked image model's training: strict (unknown keys are errors), read from YAML."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from hasten.distill.pretrain.config import Strict
from hasten.distill.pretrain.text_config import ModelConfig, TrainingConfig

CANVAS = 32
"""Pixels of a side of an image."""

CLASSES = 10


class CodesConfig(Strict):
    """Images as tokens: patches of `patch` x `patch` pixels, each the nearest of `count` that k-means has found."""

    count: int = Field(256, ge=2, le=1024)
    patch: PositiveInt = 4
    rounds: PositiveInt = 15
    sample: PositiveInt = 20_000
    """Patches that k-means looks at."""

    @model_validator(mode="after")
    def _fits(self) -> CodesConfig:
        if CANVAS % self.patch:
            raise ValueError(f"patch must divide {CANVAS}, the side of an image, got {self.patch}")
        return self

    @property
    def slots(self) -> int:
        """Tokens of an image."""
        return (CANVAS // self.patch) ** 2


class DigitsConfig(Strict):
    """What is learned: `images` digits of `size` pixels near the centre, `batch` a step; of a share the class is dropped."""

    images: PositiveInt = 30_000
    size: int = Field(20, ge=8, le=CANVAS - 4)
    batch: PositiveInt = 48
    drop_class: float = Field(0.1, ge=0, lt=1)


class MaskedImageConfig(Strict):
    """One model of images as tokens: what it is, what its tokens are, what it learns from and how long.

    masked-image: it sees both ways, and writes slots in any order. image-tokens: an ordinary causal language model, which
    writes them row by row.
    """

    name: str
    kind: Literal["masked-image", "image-tokens"]
    seed: int = 0
    model: ModelConfig = ModelConfig(width=128, layers=4, heads=4, ffn=320, positions=128)
    codes: CodesConfig = CodesConfig()
    digits: DigitsConfig = DigitsConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _sees_all(self) -> MaskedImageConfig:
        if self.kind == "masked-image" and (self.model.attention != "full" or self.model.shifted):
            raise ValueError("model.attention must be full and model.shifted false: images are written in any order")
        if self.kind == "image-tokens" and self.model.attention != "causal":
            raise ValueError("model.attention must be causal: image-tokens are written in reading order")
        if self.codes.slots + 1 > self.model.positions:
            raise ValueError(f"model.positions must be {self.codes.slots + 1} at least, got {self.model.positions}")
        return self
