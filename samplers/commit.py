"""How many slots are written after an evaluation, and which.

Shapes: B texts, L slots. A rule gets what is known of every slot (`Scores`) and says which of the eligible ones are
written. The engine sees to it that every open text writes at least one: the surest of its score.

Rules that ask how sure a slot is are in `commit_sure.py`, those that compare with earlier evaluations in
`commit_history.py`, those that are told from outside in `commit_told.py`, a trained one in `filter.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import Canvas
from hasten.errors import UsageError
from hasten.part import Part
from hasten.recipe import Commit
from hasten.samplers.scores import Confidence, Logits, Score, Scores, Sees, best


class CommitRule(Part):
    """Which slots are sure enough? A family; `start()` gives the state for one generation.

    sees: whose logits it wants. written: it wants those of slots that are written already, too. remembers: it uses
    more than the present evaluation, so that drafts cannot be verified with it. timed: it asks for the number of the
    step. guided: it wants `scores.guide`.
    """

    sees: ClassVar[Sees] = "block"
    written: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    guided: ClassVar[bool] = False

    def start(self) -> CommitState:
        """State of one generation."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class CommitState:
    """The state of a `CommitRule`."""

    def observe(self, known: Logits, canvas: Canvas) -> None:
        """After each evaluation: its log-probabilities [m, R, V] float32. By default nothing is kept of them."""

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        """Slots to write, bool [B, L]; those that are not `scores.among(canvas)` are ignored."""
        raise NotImplementedError(f"{type(self).__name__} has no select().")

    def planned(self, canvas: Canvas, evaluations: int) -> Tensor | None:
        """How many slots this evaluation and the next ones of the block will write, int64 [B], for caches that fix them
        beforehand; None: that is not known before the scores are."""
        return None


class Unmask(Commit):
    """Write the slots that `rule` takes, in the order and with the tokens of `score`."""

    kind: ClassVar[str] = "unmask"
    rule: CommitRule
    score: Score = Confidence()

    @property
    def rules(self) -> list[CommitRule]:
        """The rule, and those that it is made of."""
        return [part for part in _within(self) if isinstance(part, CommitRule)]

    @property
    def remembers(self) -> bool:
        """A rule or score of it uses more than the present evaluation."""
        return any(part.remembers for part in _within(self) if isinstance(part, CommitRule | Score))

    @property
    def timed(self) -> bool:
        """A rule or score of it asks for the number of the step."""
        return any(part.timed for part in _within(self) if isinstance(part, CommitRule | Score))

    def with_steps(self, steps: int) -> Unmask:
        """The same in `steps` evaluations. Raises `UsageError` where they cannot be chosen, or are fewer than 1."""
        if steps < 1:
            raise UsageError(f"steps must be at least 1, got {steps}.")
        if not any(isinstance(rule, Quota | Falling) for rule in self.rules):
            raise UsageError(
                f"steps={steps} was given, but the commit rule {self.rule.kind!r} finds out itself how many it needs."
                " Leave steps out, or take a recipe with a quota."
            )
        return Unmask(rule=_paced(self.rule, steps), score=self.score)


class Quota(CommitRule):
    """As many per evaluation as make `steps` evaluations of the whole text (LLaDA, arXiv 2502.09992).

    A block of m slots gets its share S of the steps; each writes floor(m / S) slots, the first m mod S one more.
    LLaDA asserts that blocks divide the text and steps the blocks; here the shares are rounded instead. steps None:
    one slot per evaluation, which is the sequential decoding that others are compared with.
    """

    kind: ClassVar[str] = "quota"
    timed: ClassVar[bool] = True
    steps: int | None = Field(None, ge=1)

    def start(self) -> CommitState:
        return _QuotaState(self)


class _QuotaState(CommitState):
    def __init__(self, rule: Quota) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        return best(scores.rank, scores.among(canvas), self.planned(canvas, 1))

    def planned(self, canvas: Canvas, evaluations: int) -> Tensor:
        begun = canvas.begun.clamp(min=1)
        steps = begun if self.rule.steps is None else _share(self.rule.steps, canvas)
        longer = (begun % steps - canvas.since).clamp(0, evaluations)  # of these evaluations, those with one slot more
        return begun // steps * evaluations + longer


class Falling(CommitRule):
    """As many as a noise level unveils that falls evenly from 1 to `last` in `steps` evaluations (Dream, arXiv
    2508.15487).

    Of the m slots that are open, floor(m (1 - s / t)) are written when the level falls from t to s, and all in the
    last evaluation. A block gets its share of the steps, as with `Quota` (Dream has no blocks). Dream divides the
    masks of the batch by its size, so that one text's number depends on the others; here each has its own. Dream may
    write none; the engine writes at least one.
    """

    kind: ClassVar[str] = "falling"
    timed: ClassVar[bool] = True
    steps: int = Field(512, ge=1)
    last: float = Field(1e-3, gt=0, lt=1)

    def start(self) -> CommitState:
        return _FallingState(self)


class _FallingState(CommitState):
    def __init__(self, rule: Falling) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        return best(scores.rank, scores.among(canvas), self.planned(canvas, 1))

    def planned(self, canvas: Canvas, evaluations: int) -> Tensor:
        steps, masks = _share(self.rule.steps, canvas), canvas.eligible.sum(1)
        left = masks
        for since in (canvas.since + after for after in range(evaluations)):
            t, s = (1 - (1 - self.rule.last) * at / steps.double() for at in (since, since + 1))
            left = left - torch.where(since < steps - 1, (left * (1 - s / t)).floor().long(), left)
        return masks - left


class Threshold(CommitRule):
    """All slots with confidence >= `above`, or the surest one (Fast-dLLM, arXiv 2505.22618).

    0.5 is what dParallel (arXiv 2509.26488) uses on models that it has trained to be certain.
    """

    kind: ClassVar[str] = "threshold"
    above: float = Field(0.9, ge=0, le=1)

    def start(self) -> CommitState:
        return _ThresholdState(self)


class _ThresholdState(CommitState):
    def __init__(self, rule: Threshold) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        return scores.among(canvas) & (scores.confidence >= self.rule.above)


class Either(CommitRule):
    """What any of `rules` takes.

    Threshold and quota together are SDAR's and LLaDA2's "low-confidence dynamic": the sure ones where there are at
    least as many as the quota, else the quota's. A rule that takes nothing at times needs no quota of one: the engine
    has it.
    """

    kind: ClassVar[str] = "either"
    rules: tuple[CommitRule, ...] = Field(min_length=1)

    def start(self) -> CommitState:
        return _EitherState(self)


class _EitherState(CommitState):
    def __init__(self, rule: Either) -> None:
        self.states = [each.start() for each in rule.rules]

    def observe(self, known: Logits, canvas: Canvas) -> None:
        for state in self.states:
            state.observe(known, canvas)

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        return torch.stack([state.select(scores, canvas) for state in self.states]).any(0)


def _share(steps: int, canvas: Canvas) -> Tensor:
    """The active block's part of `steps` for the whole text, int64 [B], at least 1 and at most its slots."""
    begun = canvas.begun.clamp(min=1)
    whole = (canvas.end - canvas.start).clamp(min=1)
    return torch.minimum((steps * begun / whole).round().long().clamp(min=1), begun)


def _paced(rule: CommitRule, steps: int) -> CommitRule:
    if isinstance(rule, Quota | Falling):
        return rule.model_copy(update={"steps": steps})
    return Either(rules=tuple(_paced(each, steps) for each in rule.rules)) if isinstance(rule, Either) else rule


def _within(part: Part) -> Iterator[Part]:
    """`part`, and the parts that it is made of."""
    yield part
    for name in type(part).model_fields:
        value = getattr(part, name)
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Part):
                yield from _within(inner)
