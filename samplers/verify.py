"""Drafts of several slots that are checked in one evaluation.

Shapes: B texts, K drafts of each, L slots.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hasten.canvas import Canvas, TextFacts
from hasten.recipe import Verify
from hasten.samplers.scores import Scores


class Verifier(Verify):
    """Base of the verifiers; `start()` gives the state for one generation. lossless: the tokens are those of sequential
    decoding with the same scores, rule and cache."""

    lossless: ClassVar[bool] = True

    def start(self, facts: TextFacts) -> VerifierState:
        """State of one generation."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class VerifierState:
    """The state of a `Verifier`.

    One step of the engine with a verifier: `drafts` from the scores of the present texts; one evaluation of all drafts,
    which gives scores for each; the commit rule says what each draft would write next; `accept` picks one draft for each
    text, which becomes the text, and its scores those of the next step.
    """

    def drafts(self, scores: Scores, first: Tensor, canvas: Canvas) -> Tensor:
        """Which slots each draft writes (with `scores.token`), bool [B, K, L]. first bool [B, L]: what the commit rule
        would write now; it is draft 0."""
        raise NotImplementedError(f"{type(self).__name__} has no drafts().")

    def accept(self, drafts: Tensor, ids: Tensor, scores: Scores, then: Tensor, canvas: Canvas) -> Tensor:
        """Number of the draft that is right for each text, int64 [B].

        ids int64 [B, K, L]: the drafts' texts. scores: after the evaluation, [B * K, L], text by text. then bool
        [B, K, L]: what the commit rule writes next into each draft, with the tokens of `scores`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no accept().")
