"""Drafts of several slots that are checked in one evaluation.

Shapes: B texts, K drafts of each, L slots.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import Canvas, TextFacts
from hasten.recipe import Verify


class Verifier(Verify):
    """Base of the verifiers; `start()` gives the state for one generation.

    The drafts of a text are a ladder: the first is the text itself, each of the others has written what the commit rule
    would write next if the last evaluation still held. All are evaluated in one call. So the evaluation of one that turns
    out right is one that decoding without drafts would have made later, and a step is never worse than one without.

    most: drafts of a text in one call at most, the text itself among them. lossless: the tokens are those of decoding
    without drafts with the same scores, rule and cache (up to rounding: calls of other shapes add in another order).
    """

    most: int = Field(4, ge=2)
    lossless: ClassVar[bool] = True

    def start(self, facts: TextFacts) -> VerifierState:
        """State of one generation."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class VerifierState:
    """The state of a `Verifier`."""

    def passed(self, drafts: Tensor, after: Tensor) -> Tensor:
        """Which drafts the text goes through, bool [B, K]; the first always, the last of them becomes the text.

        drafts int64 [B, K, L]: their tokens. after int64 [B, K, L]: with what the commit rule writes next into each.
        """
        raise NotImplementedError(f"{type(self).__name__} has no passed().")

    def learn(self, passed: Tensor, tried: Tensor, canvas: Canvas) -> None:
        """What came of it. passed bool [B, K]; tried int64 [B]: drafts of each text that were evaluated, 1 for those
        that had none. May set `canvas.drafts`: how many are worth it next time."""


class FreeDave(Verifier):
    """A draft is right if decoding would have come to exactly this text (FreeDave, arXiv 2510.00294).

    From the text itself on: if the text with what the rule now writes into it equals a draft, that draft's evaluation is
    the next one, and so on until none does. With a rule that writes several slots (their `FreeDave++` drafts threshold
    sets) theirs also accepts a draft with fewer tokens than the rule writes, so that later tokens come from an evaluation
    that decoding would not have made; here equality is asked, and every rule without memory is reproduced exactly. Theirs
    has batches of 1 and always drafts one slot at a time.

    share: of the number of drafts of a text, how much follows its last evaluation: it becomes two more than a moving
    average of the drafts that were right (the idea of DiffuSpec's adaptive length, arXiv 2510.02358); 0: always `most`.
    The paper's defaults: 4 drafts, blocks of 32.
    """

    kind: ClassVar[str] = "freedave"
    share: float = Field(0.3, ge=0, le=1)

    def start(self, facts: TextFacts) -> VerifierState:
        return _FreeDaveState(self)


class _FreeDaveState(VerifierState):
    def __init__(self, verifier: FreeDave) -> None:
        self.verifier = verifier
        self.right: Tensor | None = None

    def passed(self, drafts: Tensor, after: Tensor) -> Tensor:
        rows = torch.arange(len(drafts), device=drafts.device)
        at = torch.zeros_like(rows)
        path = [torch.ones_like(rows, dtype=torch.bool)]
        for number in range(1, drafts.shape[1]):  # drafts only grow, so that one way upwards finds all
            same = (drafts[:, number] == after[rows, at]).all(1)
            at = torch.where(same, number, at)
            path.append(same)
        return torch.stack(path, 1)

    def learn(self, passed: Tensor, tried: Tensor, canvas: Canvas) -> None:
        share, most = self.verifier.share, self.verifier.most
        if share == 0:
            return
        if self.right is None:
            self.right = torch.full_like(canvas.step, most - 2, dtype=torch.float32)
        right = passed.sum(1) - 1
        right = right + (right == tried - 1)  # all of them: one more might have been right
        self.right = torch.where(tried > 1, (1 - share) * self.right + share * right, self.right)
        canvas.drafts = (self.right.round().long() + 2).clamp(2, most)
