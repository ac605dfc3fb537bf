"""How long, how fast and how exactly a training runs: the same for every method."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from hasten.distill.loop.schedule import learning_rate

Precision = Literal["no", "bf16"]
Schedule = Literal["plateau", "constant", "linear", "cosine"]
Optimizer = Literal["adamw", "adamw8bit"]
Tracker = Literal["none", "tensorboard", "trackio"]


def _said(also: dict[str, str]) -> BeforeValidator:
    """Other trainers' spellings of a value, and capitals, mean ours."""
    return BeforeValidator(lambda value: also.get(value.lower(), value.lower()) if isinstance(value, str) else value)


class TrainSettings(BaseModel):
    """Settings of the loop. Rates are for AdamW on float32 weights; `precision` is that of evaluations alone.

    steps: batches of the method (a DMD step may train its critic several times). batch: rows of a step, of all processes
    together. accumulate: parts in which a batch is evaluated; it stays as large as it is. lr: of the student; `role_lr` of
    others. optimizer: `adamw` or `adamw8bit`, with `betas` and `weight_decay`. clip: largest norm of a role's gradient.
    schedule: what follows the `warmup` (its steps): `plateau` stays and falls to zero over the last `cooldown` (a share) of the
    steps, `constant` stays, `linear` and `cosine` fall all the time. average: decay of the averaged weights that are
    exported, 0 for none. checkpointing: blocks are evaluated again for their gradient instead of being kept. shard: weights
    and optimisers are cut among the processes. seed: of all random numbers.
    checkpoint_every: steps between checkpoints, 0 for every two minutes. report_to: who gets the log's rows beside
    log.jsonl. samples_every: steps between sheets of `samples` pictures beside the teacher's, 0 for none. recall: samples of
    the student that are compared with the data at the same steps, 0 for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(1000, ge=1)
    batch: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-4, gt=0)
    role_lr: dict[str, float] = Field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    optimizer: Annotated[Optimizer, _said({})] = "adamw"
    schedule: Annotated[Schedule, _said({"constant_with_warmup": "constant"})] = "plateau"
    warmup: int = Field(20, ge=0)
    cooldown: float = Field(0.3, ge=0, le=1)
    clip: float = Field(1.0, gt=0)
    average: float = Field(0.99, ge=0, lt=1)
    precision: Precision = "no"
    checkpointing: bool = False
    checkpoint_every: int = Field(0, ge=0)
    shard: bool = False
    report_to: Annotated[Tracker, _said({})] = "none"
    samples_every: int = Field(0, ge=0)
    samples: int = Field(4, ge=1, le=64)
    recall: int = Field(0, ge=0, le=1024)
    seed: int = 0

    @field_validator("precision", mode="before")
    @classmethod
    def _no_means_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # what YAML makes of no

    @field_validator("recall")
    @classmethod
    def _enough(cls, value: int) -> int:
        if 0 < value < 16:
            raise ValueError("recall of fewer than 16 samples says nothing; 0 is for none")
        return value

    def factor(self, step: int) -> float:
        """Share of the learning rate at a step, in (0, 1]."""
        if self.schedule == "plateau":
            return learning_rate(step, self.steps, self.warmup, self.cooldown)
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = min(1.0, (self.steps - step) / max(1, self.steps - self.warmup))
        return rise * {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[self.schedule]
