"""Which written slots are taken back or replaced.

Shapes: B texts, L slots. Policies that take back what looks wrong are in `revise_erase.py`, those that take back what was
written unsurely in `revise_unsure.py`, those that replace tokens in `revise_edit.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import DONE, Canvas, TextFacts
from hasten.recipe import Revise
from hasten.samplers.scores import Scores, best


@dataclass(slots=True)
class Revision:
    """What changes. erase: slots that become masks again; replace: slots that get `token`. bool, bool, int64 [B, L];
    None where nothing does."""

    erase: Tensor | None = None
    replace: Tensor | None = None
    token: Tensor | None = None


class RevisePolicy(Revise):
    """Base of the revisers; `start()` gives the state for one generation.

    budget: how often a slot is revised at most. written: it wants the logits of written slots of the active block, too.
    shadows: it wants them of a mask in their place, which reads everything else, and which nobody reads. What keeps all of
    them honest is in `Reviser`.
    """

    budget: int = Field(2, ge=1)
    written: ClassVar[bool] = True
    shadows: ClassVar[bool] = False

    def start(self, facts: TextFacts) -> ReviseState:
        """State of one generation. Raises `RefusedError` on a model for which it cannot be right."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class ReviseState:
    """The state of a `RevisePolicy`. may, bool [B, L]: slots that can be revised now. seed, int64 [B]: of each text's
    noise."""

    seed: Tensor

    def least(self, scores: Scores, chosen: Tensor, may: Tensor, canvas: Canvas) -> Tensor | None:
        """How many slots each text should write in this step at least, int64 [B]; None: one. chosen, bool [B, L]: those that
        the commit rule takes."""
        return None

    def revise(self, scores: Scores, written: Tensor, may: Tensor, canvas: Canvas) -> Revision:
        """What to change after `written` (bool [B, L]) have been written in this step."""
        raise NotImplementedError(f"{type(self).__name__} has no revise().")

    def holds(self, canvas: Canvas) -> Tensor | None:
        """Texts (bool [B]) whose block, though full, is to be evaluated once more; None: none."""
        return None


class Reviser:
    """A policy's state, and what keeps every policy honest.

    Only written slots of the active block are revised, never one that has just been written, and each at most `budget`
    times. A text loses at least one slot fewer than it has just written. A full block is held only as long as the last
    step changed something in it and something in it may still change.

    So a block of n slots ends within (budget + 1) n steps: a step with an open slot writes at least one more than it takes
    back, which can happen n times; every other step holds a full block, follows a change, and, but for the last, makes one:
    there are at most budget n of these, and where all of them were made nothing may change any more, so that there is no
    last step without one.
    """

    def __init__(self, policy: RevisePolicy, facts: TextFacts, canvas: Canvas, seed: Tensor | None = None) -> None:
        self.state, self.budget = policy.start(facts), policy.budget
        self.state.seed = torch.zeros_like(canvas.start) if seed is None else seed.to(canvas.start.device)
        self.mask_id = facts.mask_id if facts.mask_id is not None else facts.pad_id  # without masks noise follows
        self.times = torch.zeros_like(canvas.committed)
        self.moved = torch.zeros_like(canvas.open)

    def least(self, scores: Scores, chosen: Tensor, canvas: Canvas) -> Tensor | None:
        """How many slots each text should write at least, int64 [B]; None: one. chosen, bool [B, L]: what the rule takes."""
        return self.state.least(scores, chosen, self._may(canvas), canvas)

    def revise(self, scores: Scores, written: Tensor, canvas: Canvas) -> Tensor:
        """Change the canvas; returns slots whose token is no longer what it was, bool [B, L]."""
        may = self._may(canvas) & ~written
        asked = self.state.revise(scores, written, may, canvas)
        changed = torch.zeros_like(written)
        if asked.replace is not None and asked.token is not None:
            changed = asked.replace & may & (asked.token != canvas.ids)
            canvas.write(changed, asked.token, scores.confidence)
        if asked.erase is not None:
            most = (written.sum(1) - 1).clamp(min=0)
            gone = best(-scores.present.nan_to_num(1.0), asked.erase & may & ~changed, most)
            canvas.erase(gone, self.mask_id)
            changed = changed | gone
        self.times = self.times + changed
        self.moved = (written | changed).any(1)
        return changed

    def holds(self, canvas: Canvas) -> Tensor | None:
        """Texts (bool [B]) whose full block is evaluated once more; None: none."""
        asked = self.state.holds(canvas)
        return None if asked is None else asked & self.moved & self._may(canvas).any(1)

    def _may(self, canvas: Canvas) -> Tensor:
        return (canvas.status == DONE) & canvas.active & (self.times < self.budget)


def at_least(least: Tensor | None, chosen: Tensor, scores: Scores, canvas: Canvas) -> Tensor:
    """`chosen` (bool [B, L], slots that may be written), and the next best up to `least` (int64 [B]; None: one)."""
    missing = (~chosen.any(1)).long() if least is None else (least.clamp(min=1) - chosen.sum(1)).clamp(min=0)
    return chosen | best(scores.rank, scores.among(canvas) & ~chosen, missing)
