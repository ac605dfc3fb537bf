"""Verification by comparing: what the model would write behind a node, or has drawn there, is looked for among its children.

Exact for tokens chosen in any way, because what is written never depends on what was drafted.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hasten.samplers.decode.draws import sample
from hasten.samplers.decode.paths import path_to
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Facts, Target, Verdict, Verifier, VerifierState


class GreedyTree(Verifier):
    """The longest path of the model's most probable tokens (SpecInfer, arXiv 2305.09781; Medusa, arXiv 2401.10774).

    Token by token the text of greedy decoding. Where tokens are sampled it is `SampleMatch`.
    """

    kind: ClassVar[str] = "greedy-tree"

    def start(self, facts: Facts) -> VerifierState:
        return _MatchState()


class SampleMatch(Verifier):
    """Draw a token behind every node from the model's law, and follow the drafts that equal it.

    As transformers does with candidates that have no law. On points it accepts as often as `MultiRound`; on drawn drafts
    less often, because it does not use that they were drawn from something like the model's law.
    """

    kind: ClassVar[str] = "sample-match"

    def start(self, facts: Facts) -> VerifierState:
        return _MatchState()


class ComparedState(VerifierState):
    """Of verifiers that write, where nothing was drafted, what the model writes."""

    def alone(self, last: Tensor, target: Target) -> Tensor:
        return chosen(target)[:, 0]


class _MatchState(ComparedState):
    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        return match(proposal, target)


def match(proposal: Proposal, target: Target) -> Verdict:
    """Follow what the model writes behind every node."""
    return follow(proposal, chosen(target), once=target.sampled)


def chosen(target: Target) -> Tensor:
    """What the model writes behind every node, int64 [B, N]: drawn, or the most probable token."""
    return sample(target.law(), 1, "iid")[..., 0] if target.sampled else target.best()


def follow(proposal: Proposal, tokens: Tensor, *, once: bool = False) -> Verdict:
    """The longest path on which each node's token is the one in `tokens` int64 [B, N] of its parent.

    once: of siblings with one token only the first is followed. That is needed where the tokens behind them were drawn apart
    from one another: to go on with whichever leads further would prefer texts that were drafted.
    """
    if proposal.size == 1:  # no drafts: a round that is as cheap as one without this library
        none = torch.zeros_like(proposal.tokens)
        return Verdict(none, none[:, 0], tokens[:, 0])
    right = verified = proposal.verified
    if once:
        earlier = torch.ones(proposal.size, proposal.size, dtype=torch.bool, device=right.device).tril(-1)
        same = (proposal.tokens[:, :, None] == proposal.tokens[:, None]) & (proposal.parent[:, :, None] == proposal.parent[:, None])
        right = verified & ~(same & earlier & verified[:, None]).any(-1)
    right = right & (proposal.tokens == tokens.gather(1, proposal.parent.clamp(min=0)))
    return longest(proposal, right, tokens)


def longest(proposal: Proposal, right: Tensor, tokens: Tensor) -> Verdict:
    """The longest path from node 0 through nodes that are `right` bool [B, N], and the token behind it."""
    above, depth = proposal.ancestors(), proposal.depth()
    fallen = (above & ~(right | (proposal.parent < 0))[:, None, :]).any(-1)
    count, at = depth.masked_fill(fallen, -1).max(1)
    return Verdict(path_to(at, above, depth), count, tokens.gather(1, at[:, None])[:, 0])
