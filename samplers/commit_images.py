"""How many slots of an image are written at each step, and in what order: MaskGIT's schedule and noise.

Shapes: B images, L slots.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import Canvas
from hasten.noise import gumbel
from hasten.samplers.commit import CommitRule, CommitState
from hasten.samplers.scores import Draw, Score, Scores, ScoreState, best


class Curve(CommitRule):
    """Few slots at first and many at the end, in `steps` evaluations of a block (MaskGIT, arXiv 2202.04200, section 3.3).

    Of m slots, floor(m f(s / T)) are still open after evaluation s of T, with f(r) = cos(pi r / 2), or 1 - r^power where
    a power is given (ReCAP's experiments, arXiv 2505.19089, have 2.5). At least one is written by each, and one is left
    for each that is to come (MaskGIT leaves one in all, which for its cosine is the same while T <= m); a block with fewer
    than T slots is over after as many evaluations (MaskGIT evaluates on and writes nothing).
    """

    kind: ClassVar[str] = "curve"
    timed: ClassVar[bool] = True
    steps: int = Field(12, ge=1)
    power: float | None = Field(None, gt=0)

    def start(self) -> CommitState:
        return _CurveState(self)


class _CurveState(CommitState):
    def __init__(self, rule: Curve) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        return best(scores.rank, scores.among(canvas), self.planned(canvas, 1))

    def planned(self, canvas: Canvas, evaluations: int) -> Tensor:
        now = left = canvas.eligible.sum(1)
        for since in (canvas.since + after for after in range(evaluations)):
            done = ((since + 1).double() / self.rule.steps).clamp(max=1)
            falls = torch.cos(done * (math.pi / 2)) if self.rule.power is None else 1 - done**self.rule.power
            open_then = (canvas.begun * falls + 1e-9).floor().long()  # cos(pi / 2) and its like are no whole numbers
            wanted = torch.maximum(open_then, self.rule.steps - since - 1)
            left = torch.minimum(wanted, left - 1).clamp(min=0)
        return now - left


class Annealed(Score):
    """log p of the drawn token plus Gumbel noise that fades out: temperature (1 - s / T) at evaluation s of T (MaskGIT).

    temperature: MaskGIT's 4.5. steps: T, that of the commit rule. Noise and tokens have streams of their own.
    """

    kind: ClassVar[str] = "annealed"
    timed: ClassVar[bool] = True
    steps: int = Field(12, ge=1)
    temperature: float = Field(4.5, ge=0)

    def start(self) -> ScoreState:
        return _AnnealedState(self, self.steps, self.temperature)


class _AnnealedState(ScoreState):
    def __init__(self, part: Annealed, steps: int, temperature: float) -> None:
        super().__init__(part)
        self.steps, self.temperature = steps, temperature

    def rank(self, scores: Scores, canvas: Canvas, draw: Draw) -> Tensor:
        after = (canvas.step + 1).double() / self.steps
        warmth = (self.temperature * (1 - after).clamp(min=0))[:, None].float()
        slots = canvas.place - canvas.start[:, None]
        noise = gumbel(draw.seed[:, None], -1 - canvas.step[:, None], slots, 1)[..., 0]  # tokens are drawn at steps >= 0
        return scores.confidence.clamp(min=1e-30).log() + warmth * noise
