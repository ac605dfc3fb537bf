"""How many slots are written after an evaluation, and which.

Shapes: B texts, L slots. A rule gets what is known of every slot (`Scores`) and says which of the eligible ones are
written. The engine sees to it that every open text writes at least one.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from hasten.canvas import Canvas
from hasten.part import Part
from hasten.recipe import Commit
from hasten.samplers.scores import Confidence, Score, Scores, Sees, best


class CommitRule(Part):
    """Which slots are sure enough? A family; `start()` gives the state for one generation.

    sees: whose logits it wants. written: it wants those of slots that are written already, too.
    """

    sees: ClassVar[Sees] = "block"
    written: ClassVar[bool] = False

    def start(self) -> CommitState:
        """State of one generation."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class CommitState:
    """The state of a `CommitRule`."""

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        """Slots to write, bool [B, L]; those that are not `scores.among(canvas)` are ignored."""
        raise NotImplementedError(f"{type(self).__name__} has no select().")


class Unmask(Commit):
    """Write the slots that `rule` takes, in the order and with the tokens of `score`."""

    kind: ClassVar[str] = "unmask"
    rule: CommitRule
    score: Score = Confidence()


class Quota(CommitRule):
    """As many per evaluation as make `steps` evaluations of the whole text (LLaDA, arXiv 2502.09992).

    A block of m slots gets its share S of the steps; each writes floor(m / S) slots, the first m mod S one more. LLaDA
    asserts that blocks divide the text and steps the blocks; here the shares are rounded instead. steps None: one slot
    per evaluation, which is the sequential decoding that others are compared with.
    """

    kind: ClassVar[str] = "quota"
    steps: int | None = Field(None, ge=1)

    def start(self) -> CommitState:
        return _QuotaState(self)


class _QuotaState(CommitState):
    def __init__(self, rule: Quota) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        among = scores.among(canvas)
        begun = canvas.begun.clamp(min=1)
        steps = begun
        if self.rule.steps is not None:
            whole = (canvas.end - canvas.start).clamp(min=1)
            steps = (self.rule.steps * begun / whole).round().long().clamp(min=1)
        count = begun // steps + (canvas.since < begun % steps)
        return best(scores.rank, among, count)


class Threshold(CommitRule):
    """All slots with confidence >= `above`, or the surest one (Fast-dLLM, arXiv 2505.22618)."""

    kind: ClassVar[str] = "threshold"
    above: float = Field(0.9, ge=0, le=1)

    def start(self) -> CommitState:
        return _ThresholdState(self)


class _ThresholdState(CommitState):
    def __init__(self, rule: Threshold) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        return scores.among(canvas) & (scores.confidence >= self.rule.above)
