"""Which written slots are taken back or replaced.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hasten.canvas import Canvas, TextFacts
from hasten.recipe import Revise
from hasten.samplers.scores import Scores


@dataclass(slots=True)
class Revision:
    """What changes. erase: slots that become masks again; replace: slots that get `token`. bool, bool, int64 [B, L];
    None where nothing does."""

    erase: Tensor | None = None
    replace: Tensor | None = None
    token: Tensor | None = None


class RevisePolicy(Revise):
    """Base of the revisers; `start()` gives the state for one generation.

    The engine owns what keeps them honest: prompts are never touched, a text never loses as many slots as it has just
    written, and every slot is revised at most `budget` times.
    """

    budget: int = 2
    written: ClassVar[bool] = True
    """It wants the logits of written slots of the active block, too."""

    def start(self, facts: TextFacts) -> ReviseState:
        """State of one generation."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class ReviseState:
    """The state of a `RevisePolicy`."""

    def revise(self, scores: Scores, written: Tensor, canvas: Canvas) -> Revision:
        """What to change after `written` (bool [B, L]) have been written in this step."""
        raise NotImplementedError(f"{type(self).__name__} has no revise().")

    def holds(self, canvas: Canvas) -> Tensor | None:
        """Texts (bool [B]) whose block, though full, is to be evaluated once more; None: none."""
        return None
