"""How long, how fast and how exactly a training runs: the same for every method."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["no", "bf16"]


class TrainSettings(BaseModel):
    """Settings of the loop. Rates are for AdamW on float32 weights; `precision` is that of evaluations alone.

    steps: batches of the method (a DMD step may train its critic several times). lr: of the student; `role_lr` of
    others. cooldown: share of the steps over which the rate falls to zero. average: decay of the averaged weights that
    are exported, 0 for none. accumulate: parts in which a batch is evaluated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(1000, ge=1)
    batch: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-4, gt=0)
    role_lr: dict[str, float] = Field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(20, ge=0)
    cooldown: float = Field(0.3, ge=0, le=1)
    clip: float = Field(1.0, gt=0)
    average: float = Field(0.99, ge=0, lt=1)
    precision: Precision = "no"
    checkpointing: bool = False
    seed: int = 0
