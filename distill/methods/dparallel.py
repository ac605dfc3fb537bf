"""Certainty-forcing distillation (dParallel, arXiv 2509.26488, section 3.2): the student is to be as sure at once as the
teacher is in the end.

It learns the teacher's own texts under masks, block by block: blocks before the one that is drawn are written, those
behind it are masked, and of the block itself a share is masked in one pass and the rest in a second one, so that each of
its tokens is asked for exactly once. The loss is cross-entropy, and beta times the entropy, at a temperature, of those
answers that are right already: what is right is made sure, what is wrong is not.

Differs from the paper: every row has a block and masks of its own (there one block serves the batch); means are taken
row by row; and the share of masks may be drawn from a range, since a generation begins with a block that is all masks.

Shapes: B texts of at most L tokens; n tokens that are asked for, V logits of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, MethodState
from hasten.distill.text.method import TextMethod, TextState
from hasten.distill.text.reorder import reordered
from hasten.distill.text.roles import Texts


class DParallel(TextMethod):
    """block: slots of a block. masked: share of a block that is masked in the first pass, drawn evenly from this range.
    beta, temperature: of the entropy of right answers. slack: nats per token by which a reordering of the block may be less likely
    to the teacher and is learned all the same (`text/reorder.py`); None learns the teacher's own order, as the paper does."""

    kind: ClassVar[str] = "dparallel"
    recipe: ClassVar[str] = "dparallel"
    causal: ClassVar[bool] = False
    block: int = Field(32, ge=1)
    masked: tuple[float, float] = (0.5, 0.5)
    beta: float = Field(2.0, ge=0)
    temperature: float = Field(0.5, gt=0)
    slack: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> DParallel:
        low, high = self.masked
        if not 0 < low <= high <= 1:
            raise ValueError(f"masked is a range of shares, 0 < low <= high <= 1, got {low} to {high}")
        return self

    def start(self, facts: Facts) -> MethodState:
        return _DParallelState(self, facts)

    def used(self, model: str, student: Path) -> str:
        return f"{super().used(model, student)}, and decode it with the recipe dparallel"


class _DParallelState(TextState):
    def __init__(self, method: DParallel, facts: Facts) -> None:
        super().__init__(method, facts)
        self.method, self.mask = method, self.mask_token(method.kind)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        texts, m = Texts.of(batch), self.method
        low, high = drawn_block(texts, m.block, draw.uniform("block"))
        inside = (texts.place >= low[:, None]) & (texts.place < high[:, None])
        noise = torch.special.ndtr(draw.normal("slots", torch.zeros(texts.ids.shape, device=texts.ids.device)))
        share = m.masked[0] + (m.masked[1] - m.masked[0]) * draw.uniform("share")
        first = inside & (noise < share[:, None])
        own, told = self._own(texts, inside, first)
        asked = torch.cat([first, inside & ~first])
        behind = (texts.place >= high[:, None]).repeat(2, 1)
        ids = own.repeat(2, 1)
        logits = self.learner.logits(ids.masked_fill(asked | behind, self.mask), texts.end.repeat(2), asked)
        row = asked.nonzero()[:, 0] % len(texts.ids)
        loss = certainty_forcing(logits, ids[asked], row, len(texts.ids), m.beta, m.temperature)
        return Loss(loss.rows, loss.metrics | told)

    def _own(self, texts: Texts, inside: Tensor, first: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What is learned, int64 [B, L], and what the log is told of it."""
        if self.method.slack is None:
            return texts.ids, {}
        ends = self.learner.call.facts.eos_ids
        words = inside & texts.written(ends) & ~torch.isin(texts.ids, torch.tensor(ends, device=texts.ids.device))
        teacher: Any = self.roles.of("teacher")
        ids, moved = reordered(self.learner, teacher, texts, words, first & words, self.mask, self.method.slack)
        return ids, {"moved": moved.float().mean()}


def drawn_block(texts: Texts, block: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """The block [low, high), int64 [B] each, of every text that u (float64 [B] in [0, 1)) chooses among its blocks.

    Blocks are counted from the first slot that is generated; the last one may be short.
    """
    count = (texts.end - texts.start + block - 1) // block
    low = texts.start + (u * count).long() * block
    return low, torch.minimum(low + block, texts.end)


def certainty_forcing(logits: Tensor, target: Tensor, row: Tensor, rows: int, beta: float, temperature: float) -> Loss:
    """Mean cross-entropy of a row's answers, plus beta times the mean entropy of softmax(logits / temperature) of those that
    are right, in nats.

    logits float32 [n, V]; target, row int64 [n]: the right token of each, and the row it counts in. A row without right
    answers has no second part.
    """
    cross = F.cross_entropy(logits, target, reduction="none")
    right = (logits.argmax(1) == target).to(logits.dtype)
    log_p = (logits / temperature).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    zeros = logits.new_zeros(rows)
    count = zeros.index_add(0, row, torch.ones_like(cross)).clamp(min=1)
    sure = zeros.index_add(0, row, entropy * right) / zeros.index_add(0, row, right).clamp(min=1)
    found = zeros.index_add(0, row, cross) / count
    told = {"cross": found.detach().mean(), "entropy": sure.detach().mean(), "right": right.mean()}
    return Loss(found + beta * sure, told)
