"""Revisers that take back what looks wrong once more is written.

`Backtrack` and `Remask` go by what the model says of tokens that it is given, which models that were taught masks alone do
not know (the pipeline asks first, `pipelines/text_models/repeats.py`); `NarrowOut` asks with masks.

Shapes: B texts, L slots. `Scores.present` is the probability of what stands in a slot, in the last evaluation.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import DONE, Canvas, TextFacts
from hasten.errors import RefusedError
from hasten.samplers.revise import RevisePolicy, ReviseState, Revision
from hasten.samplers.scores import Scores, best


class Backtrack(RevisePolicy):
    """Those whose probability has fallen the most since the evaluation before (Saber, arXiv 2510.18165).

    After n slots have been written, max(1, floor(n / share)) are taken back: those with the largest drop
    c_j(t - 1) - c_j(t), the c of a slot's own token, if it is larger than `least`. Saber takes any drop, `least = 0`:
    where nearly everything is certain it then undoes the last step every time, rounding being a drop, too.
    """

    kind: ClassVar[str] = "backtrack"
    share: int = Field(8, ge=1)
    least: float = Field(0.05, ge=0, lt=1)

    def start(self, facts: TextFacts) -> ReviseState:
        return _BacktrackState(self)


class _BacktrackState(ReviseState):
    def __init__(self, policy: Backtrack) -> None:
        self.policy = policy
        self.last: Tensor | None = None

    def revise(self, scores: Scores, written: Tensor, may: Tensor, canvas: Canvas) -> Revision:
        if self.last is None:
            self.last = torch.full_like(scores.present, float("nan"))
        drop = self.last - scores.present  # nan where either is not known
        number = written.sum(1)
        count = torch.minimum((number // self.policy.share).clamp(min=1), number - 1)
        erase = best(drop.nan_to_num(0.0), may & scores.seen & (drop > self.policy.least), count)
        stands = scores.seen & (canvas.status == DONE) & ~written
        self.last = torch.where(written, scores.confidence, torch.where(stands, scores.present, self.last))
        return Revision(erase)


class Remask(RevisePolicy):
    """Those whose probability is now less than `below` (dInfer, arXiv 2510.08666: 0.4).

    As many slots and one more are written in the same step, by the commit rule's own order, so that the text gains.
    """

    kind: ClassVar[str] = "remask"
    below: float = Field(0.4, gt=0, le=1)

    def start(self, facts: TextFacts) -> ReviseState:
        return _RemaskState(self.below)


class _RemaskState(ReviseState):
    def __init__(self, below: float) -> None:
        self.below = below

    def least(self, scores: Scores, chosen: Tensor, may: Tensor, canvas: Canvas) -> Tensor | None:
        return (may & scores.seen & (scores.present < self.below)).sum(1) + 1

    def revise(self, scores: Scores, written: Tensor, may: Tensor, canvas: Canvas) -> Revision:
        return Revision(may & scores.seen & (scores.present < self.below))


class NarrowOut(RevisePolicy):
    """Those that the model would not write if they were masks (WINO, arXiv 2507.18578: below 0.9).

    Each written slot of the block has a shadow in the same evaluation: a mask at its place that reads all but the slot
    itself, and that nobody reads. A token is taken back if its probability there is less than `below`; the least
    probable first, and fewer than were written in this step (theirs: than in the step before).

    Their shadows read one another, too, and there is one for every slot of the block, written or not; here a shadow reads
    texts only, so that it is a true leave-one-out, and open slots, being masks themselves, need none. It goes with
    `WideIn`, which writes more than it can be sure of.
    """

    kind: ClassVar[str] = "narrow-out"
    shadows: ClassVar[bool] = True
    below: float = Field(0.9, gt=0, le=1)

    def start(self, facts: TextFacts) -> ReviseState:
        if facts.shifted:
            raise RefusedError(
                "Shadows need a model whose logits stand where their token does; this one's are shifted by one slot."
                " Take the reviser 'remask' or 'backtrack'."
            )
        if facts.mask_id is None:
            raise RefusedError("Shadows are masks, and this model has none. Leave the reviser out.")
        return _NarrowOutState(self.below)


class _NarrowOutState(ReviseState):
    def __init__(self, below: float) -> None:
        self.below = below

    def revise(self, scores: Scores, written: Tensor, may: Tensor, canvas: Canvas) -> Revision:
        return Revision(may & scores.seen & (scores.present < self.below))
