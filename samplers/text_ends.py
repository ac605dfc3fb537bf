"""When a text is over before all of its slots are written.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import DONE, Canvas, TextFacts
from hasten.part import Part
from hasten.samplers.scores import Scores, Sees


class EndRule(Part):
    """When is a text over? A family; `start()` gives the state for one generation.

    sees: whose logits it wants. remembers: it asks more than what is written, so that drafts cannot be verified with it
    (a draft stands for steps that were never taken).
    """

    sees: ClassVar[Sees] = "block"
    remembers: ClassVar[bool] = False

    def start(self, facts: TextFacts) -> EndState:
        """State of one generation."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class EndState:
    """The state of an `EndRule`."""

    def ends(self, canvas: Canvas, scores: Scores) -> Tensor | None:
        """One past the last slot of each text, int64 [B], where it is known to be shorter; None: nothing changes.

        Called after each step, when its slots are written; scores are those that led to it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no ends().")


class AtEndToken(EndRule):
    """At the first end-of-text token that is written and has nothing open before it.

    Exact: what lies behind it does not count, and nothing before it is written any more.
    """

    kind: ClassVar[str] = "end-token"

    def start(self, facts: TextFacts) -> EndState:
        return _AtEndTokenState(facts)


class _AtEndTokenState(EndState):
    def __init__(self, facts: TextFacts) -> None:
        self.facts = facts

    def ends(self, canvas: Canvas, scores: Scores) -> Tensor | None:
        if not self.facts.eos_ids:
            return None
        settled = (canvas.masked & (canvas.place >= canvas.start[:, None])).cumsum(1) == 0
        over = written_ends(canvas, self.facts) & settled
        return torch.minimum(_first(over) + 1, canvas.end)


class AtEmptyBlock(EndRule):
    """At a block that is written and holds nothing but end-of-text and padding tokens (FreeDave's `early_exit`, arXiv
    2510.00294); its first token stays.

    For models that fill what lies behind an answer with such tokens, and may write one too early.
    """

    kind: ClassVar[str] = "empty-block"

    def start(self, facts: TextFacts) -> EndState:
        return _AtEmptyBlockState(facts)


class _AtEmptyBlockState(EndState):
    def __init__(self, facts: TextFacts) -> None:
        self.facts = facts

    def ends(self, canvas: Canvas, scores: Scores) -> Tensor | None:
        if not self.facts.eos_ids:
            return None
        empty = written_ends(canvas, self.facts, padding=True)
        over = (canvas.active & ~empty).sum(1) == 0
        return torch.where(over & canvas.open, torch.minimum(canvas.span[:, 0] + 1, canvas.end), canvas.end)


class AtPredictedEnd(EndRule):
    """At an end that is predicted before it is written, where the prediction is sure, lasting and backed by what follows.

    The leftmost slot where an end-of-text token is written, or predicted with confidence >= `above`, ends the text when at
    least `run` slots behind it (all of them, where there are fewer) have one, too, and that was so in `steps` evaluations
    one after the other. What lies behind is dropped; the slot itself is still written in its turn. An end that is
    written with nothing open before it counts at once, as with `AtEndToken`.

    Learn2PD's end-of-text prediction (arXiv 2509.25188) made safe: theirs is `AtSurestEnd`. An evaluation that does not
    give logits for all open slots (most caches do so at the first step of a block alone) says nothing, and is not counted.
    """

    kind: ClassVar[str] = "predicted-end"
    sees: ClassVar[Sees] = "rest"
    remembers: ClassVar[bool] = True
    above: float = Field(0.9, ge=0, le=1)
    steps: int = Field(2, ge=1)
    run: int = Field(4, ge=0)

    def start(self, facts: TextFacts) -> EndState:
        return _AtPredictedEndState(self, facts)


class _AtPredictedEndState(EndState):
    def __init__(self, rule: AtPredictedEnd, facts: TextFacts) -> None:
        self.rule, self.facts, self.written = rule, facts, _AtEndTokenState(facts)
        self.at: Tensor | None = None
        self.times: Tensor | None = None

    def ends(self, canvas: Canvas, scores: Scores) -> Tensor | None:
        end = self.written.ends(canvas, scores)
        if end is None:
            return None
        if self.at is None or self.times is None:
            self.at, self.times = torch.full_like(canvas.end, -1), torch.zeros_like(canvas.end)
        found = self._candidate(canvas, scores)
        told = ~(canvas.masked & ~scores.seen).any(1) & canvas.open
        again = (found == self.at) & (found < canvas.slots)
        self.times = torch.where(told, torch.where(again, self.times + 1, (found < canvas.slots).long()), self.times)
        self.at = torch.where(told, found, self.at)
        lasting = (self.times >= self.rule.steps) & (self.at < canvas.slots)
        return torch.minimum(end, torch.where(lasting, self.at + 1, canvas.end))

    def _candidate(self, canvas: Canvas, scores: Scores) -> Tensor:
        """The leftmost sure and backed end of each text, int64 [B]; L where there is none."""
        written = written_ends(canvas, self.facts)
        likely = written | predicted_ends(canvas, scores, self.facts)
        # slots from here on, up to the end of the text, without a gap: distance to the next slot that is not likely
        place = canvas.place
        gap = torch.where(~likely & (place < canvas.end[:, None]), place, canvas.end[:, None])
        gap = gap.flip(1).cummin(1).values.flip(1)
        backed = (gap - place > self.rule.run) | (gap >= canvas.end[:, None])
        sure = written | likely & (scores.confidence >= self.rule.above)
        return _first(sure & backed & (place < canvas.end[:, None]))


class AtSurestEnd(EndRule):
    """At the surest predicted end of all, whatever its confidence (Learn2PD, arXiv 2509.25188, its published rule).

    After each evaluation: if an end-of-text token has just been written, the text ends at the first of these; else, if one
    is predicted for any open slot, at the one with the highest confidence, which need be neither sure nor the leftmost. It
    is lossy. Several that are written at once are not told apart there; here the first one counts.
    """

    kind: ClassVar[str] = "surest-end"
    sees: ClassVar[Sees] = "rest"
    remembers: ClassVar[bool] = True

    def start(self, facts: TextFacts) -> EndState:
        return _AtSurestEndState(facts)


class _AtSurestEndState(EndState):
    def __init__(self, facts: TextFacts) -> None:
        self.facts = facts

    def ends(self, canvas: Canvas, scores: Scores) -> Tensor | None:
        if not self.facts.eos_ids:
            return None
        last = canvas.step[:, None] - 1  # of the step that has just been taken
        new = _first(written_ends(canvas, self.facts) & (canvas.committed == last))
        likely = predicted_ends(canvas, scores, self.facts)
        surest = torch.where(likely, scores.confidence, -1.0).argmax(1)
        at = torch.where(new < canvas.slots, new, torch.where(likely.any(1), surest, canvas.end - 1))
        return torch.where(canvas.open, torch.minimum(at + 1, canvas.end), canvas.end)


def written_ends(canvas: Canvas, facts: TextFacts, padding: bool = False) -> Tensor:
    """Slots where an end-of-text token (padding: or one for padding) has been written, bool [B, L]."""
    which = (*facts.eos_ids, facts.pad_id) if padding else facts.eos_ids
    return torch.isin(canvas.ids, torch.tensor(which, device=canvas.ids.device)) & (canvas.status == DONE)


def predicted_ends(canvas: Canvas, scores: Scores, facts: TextFacts) -> Tensor:
    """Open slots for which an end-of-text token is predicted, bool [B, L]."""
    return torch.isin(scores.token, torch.tensor(facts.eos_ids, device=canvas.ids.device)) & canvas.masked & scores.seen


def _first(chosen: Tensor) -> Tensor:
    """The first of the slots `chosen` (bool [B, L]) of each text, int64 [B]; L where there is none."""
    return (chosen.cumsum(1) == 0).sum(1)
