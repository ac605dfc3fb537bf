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

    One step of a text with a verifier (but the first of a block, which is an ordinary one): `drafts` says which slots each
    draft writes beyond the present text, with tokens that the last evaluation gave; all drafts are evaluated in one call;
    the commit rule says what each would write next; `accept` picks one, which becomes the text, and whose scores count.
    """

    def drafts(self, scores: Scores, canvas: Canvas) -> Tensor:
        """Slots that each draft writes with `scores.token`, bool [B, K, L]. scores: of the last evaluation, before what
        it led to was written. Draft 0 writes nothing: it is the text as it stands, so that a step is never worse than one
        without drafts."""
        raise NotImplementedError(f"{type(self).__name__} has no drafts().")

    def accept(self, drafts: Tensor, texts: Tensor, scores: Scores, then: Tensor, canvas: Canvas) -> Tensor:
        """Number of the draft that is right for each text, int64 [B].

        texts int64 [B, K, L]: the drafts. scores: after the evaluation, [B * K, L], text by text. then bool [B, K, L]:
        what the commit rule writes next into each draft, with the tokens of `scores`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no accept().")
