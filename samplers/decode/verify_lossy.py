"""Verification that accepts more than the model's law allows. What is written is no longer the model's own text, so that each
of these has to be asked for: `allow_lossy=True`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.errors import RecipeError
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Facts, Target, Verdict, Verifier, VerifierState
from hasten.samplers.decode.verify_match import chosen, longest


class Lossy(Verifier):
    """Base of these. allow_lossy: that other texts than the model's are wanted. Raises `RecipeError` where it is not set."""

    lossless: ClassVar[bool] = False
    allow_lossy: bool = False

    @model_validator(mode="after")
    def _asked_for(self) -> Lossy:
        if not self.allow_lossy:
            raise RecipeError(
                f"verify {self.kind!r} accepts drafts that the model would not write, so that texts change. Say allow_lossy=true"
                " where that is wanted, or take a lossless one: lossless, multi-round, block."
            )
        return self

    def accepts(self, proposal: Proposal, law: Tensor) -> Tensor:
        """Which nodes are good enough if their parents are, bool [B, N]. law float32 [B, N, V]: the model's."""
        raise NotImplementedError(f"{type(self).__name__} has no accepts().")

    def start(self, facts: Facts) -> VerifierState:
        return _LossyState(self)


class _LossyState(VerifierState):
    def __init__(self, verifier: Lossy) -> None:
        self.verifier = verifier

    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        right = proposal.verified & self.verifier.accepts(proposal, target.law())
        return longest(proposal, right, chosen(target))


class Typical(Lossy):
    """Medusa's typical acceptance (arXiv 2401.10774): p(x) > min(epsilon, alpha exp(-H(p))).

    H is the entropy of the model's law behind the parent. epsilon 0.09 and alpha 0.3 are what Medusa's released code comes
    to. Differs: Medusa takes the longest path, and of those the likeliest; here the first of them.
    """

    kind: ClassVar[str] = "typical"
    epsilon: float = Field(0.09, gt=0, le=1)
    alpha: float = Field(0.3, gt=0)

    def accepts(self, proposal: Proposal, law: Tensor) -> Tensor:
        entropy = -torch.special.xlogy(law, law).sum(-1)
        limit = (self.alpha * torch.exp(-entropy)).clamp(max=self.epsilon)
        return behind_parent(proposal, law) > limit.gather(1, proposal.parent.clamp(min=0))


class Surprise(Lossy):
    """BiLD's rollback rule (arXiv 2302.07863): drafts stand until one surprises the model by more than `above` nats.

    The distance is the cross-entropy of the model against the drafted token, -log p(x); the paper's limits are 2 to 5.
    """

    kind: ClassVar[str] = "surprise"
    above: float = Field(3.0, gt=0)

    def accepts(self, proposal: Proposal, law: Tensor) -> Tensor:
        return -behind_parent(proposal, law).log() <= self.above


class Confident(Lossy):
    """Drafts of which the drafter itself is sure stand unseen, the others have to be what the model writes (the routing of
    R2R, arXiv 2505.21600, with the drafter's own probability in place of a trained router).

    above: the drafter's probability from which a token needs no consent.
    """

    kind: ClassVar[str] = "confident"
    above: float = Field(0.9, gt=0, le=1)

    def accepts(self, proposal: Proposal, law: Tensor) -> Tensor:
        parent = proposal.parent.clamp(min=0)
        if proposal.score is None:
            sure = torch.zeros_like(proposal.valid)
        else:
            sure = proposal.score / proposal.score.gather(1, parent).clamp(min=1e-30) >= self.above
        return sure | (proposal.tokens == law.argmax(-1).gather(1, parent))


def behind_parent(proposal: Proposal, law: Tensor) -> Tensor:
    """The model's probability of every node's token behind its parent, float32 [B, N]."""
    parent = proposal.parent.clamp(min=0)
    at = law.gather(1, parent[..., None].expand(-1, -1, law.shape[-1]))
    return at.gather(-1, proposal.tokens[..., None])[..., 0]
