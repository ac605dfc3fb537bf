"""Draws that depend on their place alone: the same noise whoever draws, so that close laws give equal tokens.

The largest of log p + g is a draw from p where g is Gumbel noise; with one g for each row and place, a draft from q and the model's
draw from p are coupled, and the text is the one that drawing token by token with this noise writes.

Shapes: B rows, N nodes, V tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hasten import noise
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Facts, Target, Verdict, Verifier, VerifierState
from hasten.samplers.decode.verify_match import longest


class PlaceNoise:
    """Noise of one call of `generate`, seeded by PyTorch's own generator. done int64 [B]: tokens behind the first of each row."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.vocabulary = facts, facts.vocabulary
        self.seed = noise.seeds(None, facts.rows).to(facts.device)
        self.done = torch.zeros(facts.rows, dtype=torch.long, device=facts.device)

    def draw(self, scores: Tensor, ahead: Tensor) -> Tensor:
        """Tokens int64 [B, M] with `scores` (log probabilities up to a constant, [B, M, V]) of the places `ahead` int64 [B, M] of the
        next one that is written."""
        place = self.done[:, None] + ahead
        drawn = noise.gumbel(self.seed[:, None], torch.zeros_like(place), place, self.vocabulary)
        return (scores.float() + drawn).argmax(-1)

    @classmethod
    def of(cls, facts: Facts) -> PlaceNoise:
        """That of this call: drafter and verifier get the same one."""
        held = facts.kept.get("same-noise")
        if not isinstance(held, PlaceNoise) or held.facts is not facts:
            held = facts.kept["same-noise"] = cls(facts)
        return held


class SameNoise(Verifier):
    """The model's draw behind every node is taken with the noise of its place, and drafts that equal it stand.

    Lossless for tokens chosen in any way, as `sample-match` is; a drafter that draws with the same noise is accepted more often.
    """

    kind: ClassVar[str] = "same-noise"

    def start(self, facts: Facts) -> VerifierState:
        return _SameNoiseState(PlaceNoise.of(facts))


class _SameNoiseState(VerifierState):
    def __init__(self, noise: PlaceNoise) -> None:
        self.noise = noise

    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        drawn = target.sampled
        tokens = self.noise.draw(target.law().log(), proposal.depth()) if drawn else target.best()
        right = proposal.verified & (proposal.tokens == tokens.gather(1, proposal.parent.clamp(min=0)))
        verdict = longest(proposal, right, tokens)
        self.noise.done = self.noise.done + verdict.count + 1
        return verdict
