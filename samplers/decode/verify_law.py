"""Verification by laws: a draft is accepted with the probability that makes what is written follow the model's law.

Shapes: B rows, N nodes, V tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from hasten.samplers.decode.draws import sample
from hasten.samplers.decode.paths import path_to
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Facts, Target, Verdict, Verifier, VerifierState
from hasten.samplers.decode.verify_match import ComparedState, match


class Lossless(Verifier):
    """Whatever keeps most of the draft: points are compared (`SampleMatch`), chains that were drawn node by node go through
    `Block`, other drawn nodes through `MultiRound`."""

    kind: ClassVar[str] = "lossless"

    def start(self, facts: Facts) -> VerifierState:
        return _LosslessState()


class _LosslessState(ComparedState):
    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        if proposal.law == "point" or not target.sampled:
            return match(proposal, target)
        return (block if proposal.straight else multi_round)(proposal, target.law())


class Speculative(Verifier):
    """Speculative sampling of a chain (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

    A draft x ~ q is accepted with probability min(1, p(x) / q(x)); behind the first that is not, the token comes from the
    residual max(0, p - q), normalised. A point has q = 1 for itself.
    """

    kind: ClassVar[str] = "speculative"
    shape: ClassVar[Literal["tree", "chain"]] = "chain"

    def start(self, facts: Facts) -> VerifierState:
        return _SpeculativeState()


class _SpeculativeState(ComparedState):
    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        if not target.sampled or proposal.size == 1:
            return match(proposal, target)
        law = target.law()
        p, q, p_of, q_of = chain_laws(proposal, law)
        passed = proposal.verified[:, 1:] & (torch.rand_like(p_of) * q_of < p_of)
        count = passed.long().cumprod(1).sum(1)
        return chain_verdict(proposal, law, count, (p - q).clamp(min=0))


class MultiRound(Verifier):
    """The same for trees: the children of a node are tried one after the other, each against what the elder ones have left
    of the model's law (SpecInfer, arXiv 2305.09781; SpecTr's and EAGLE's rejection sampling, arXiv 2401.15077).

    After a rejected x ~ q the law p becomes max(0, p - q), normalised. Points have q = 1 for themselves, so that they are
    struck out. Of children without replacement the q's are what is left without their elder siblings.
    """

    kind: ClassVar[str] = "multi-round"

    def start(self, facts: Facts) -> VerifierState:
        return _MultiRoundState()


class _MultiRoundState(ComparedState):
    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        if not target.sampled:
            return match(proposal, target)
        return multi_round(proposal, target.law())


class Block(Verifier):
    """Block verification (Sun et al., arXiv 2403.10444, algorithm 2): how much of a chain is kept is decided for all of it.

    With P_0 = 1 and P_i = min(1, P_{i-1} p(x_i) / q(x_i)), a prefix of length i < n is kept with probability
    R_i / (R_i + 1 - P_i), R_i = sum_x max(0, P_i p(x | x_1..x_i) - q(x | x_1..x_i)), the whole of n with P_n; the longest
    that is kept counts, and the token behind it comes from max(0, P_i p - q), normalised. Never keeps fewer on average.
    """

    kind: ClassVar[str] = "block"
    shape: ClassVar[Literal["tree", "chain"]] = "chain"

    def start(self, facts: Facts) -> VerifierState:
        return _BlockState()


class _BlockState(ComparedState):
    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        if not target.sampled or proposal.size == 1:
            return match(proposal, target)
        return block(proposal, target.law())


def block(proposal: Proposal, law: Tensor) -> Verdict:
    """Block verification of a chain. law float32 [B, N, V]."""
    p, q, p_of, q_of = chain_laws(proposal, law)
    there = proposal.verified[:, 1:]
    kept = [torch.ones_like(p_of[:, 0])]
    for step in range(p_of.shape[1]):
        kept.append((kept[-1] * p_of[:, step] / q_of[:, step].clamp(min=1e-30)).clamp(max=1))
    share = torch.stack(kept, 1)  # [B, N]: P_0 .. P_n
    rest = (share[:, :-1, None] * p - q).clamp(min=0)  # [B, N - 1, V]: behind node i, for i < n
    mass = rest.sum(-1)[:, 1:]
    inner = mass / (mass + 1 - share[:, 1:-1]).clamp(min=1e-30)
    last = there & ~torch.cat([there[:, 1:], torch.zeros_like(there[:, :1])], 1)
    chance = torch.where(last, share[:, 1:], torch.cat([inner, share[:, -1:]], 1))
    keep = there & (torch.rand_like(chance) < chance)
    index = torch.arange(1, keep.shape[1] + 1, device=keep.device)
    count = torch.where(keep, index, 0).amax(1)
    return chain_verdict(proposal, law, count, rest)


def chain_laws(proposal: Proposal, law: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each step of a chain, from node i to node i + 1: the model's and the draft's law, float32 [B, N - 1, V], and what
    they give the draft, [B, N - 1]. A point's law is 1 for itself."""
    p, tokens = law[:, :-1], proposal.tokens[:, 1:]
    point = torch.zeros_like(p).scatter(-1, tokens[..., None], 1.0)
    if proposal.drawn is None:
        q = point
    else:
        index = torch.arange(proposal.size - 1, device=tokens.device).expand_as(tokens)
        q = torch.where(proposal.drawn[:, 1:, None], proposal.q(index), point)
    return p, q, p.gather(-1, tokens[..., None])[..., 0], q.gather(-1, tokens[..., None])[..., 0]


def chain_verdict(proposal: Proposal, law: Tensor, count: Tensor, rest: Tensor) -> Verdict:
    """The first `count` int64 [B] drafts of a chain, and behind them a token: from `rest` [B, N - 1, V] where a draft was
    refused, from the model's law where there was none left."""
    nodes = proposal.size
    index = torch.arange(nodes, device=count.device).expand_as(proposal.tokens)
    drafted = proposal.verified.sum(1)
    if nodes == 1:
        return Verdict(torch.zeros_like(proposal.tokens), count, sample(law[:, 0], 1, "iid")[:, 0])
    refused = rest.gather(1, count.clamp(max=nodes - 2)[:, None, None].expand(-1, 1, rest.shape[-1]))[:, 0]
    plain = law.gather(1, count[:, None, None].expand(-1, 1, law.shape[-1]))[:, 0]
    usable = ((count < drafted) & (refused.sum(-1) > 0))[:, None]
    token = sample(torch.where(usable, refused, plain), 1, "iid")[:, 0]
    return Verdict(torch.where(index <= count[:, None], index, -1), count, token)


def multi_round(proposal: Proposal, law: Tensor) -> Verdict:
    """One pass over the nodes: a node is tried where its parent is the last accepted one. law float32 [B, N, V]."""
    tokens, parent, tried = proposal.tokens, proposal.parent, proposal.verified
    at = torch.zeros_like(tokens[:, 0])
    count, left = at.clone(), law[:, 0]
    spent = torch.zeros_like(left, dtype=torch.bool)
    chance = torch.rand(tokens.shape, device=tokens.device)
    for node in range(1, proposal.size):
        token = tokens[:, node, None]
        q = _law_of(proposal, node, spent)
        now = tried[:, node] & (parent[:, node] == at)
        passed = now & (chance[:, node] * q.gather(1, token)[:, 0] < left.gather(1, token)[:, 0])
        refused = (now & ~passed)[:, None]
        rest = (left - q).clamp(min=0)
        mass = rest.sum(-1, keepdim=True)
        left = torch.where(refused & (mass > 0), rest / mass.clamp(min=torch.finfo(rest.dtype).tiny), left)
        left = torch.where(passed[:, None], law[:, node], left)
        if proposal.law == "without_replacement":
            drawn = refused if proposal.drawn is None else refused & proposal.drawn[:, node, None]
            spent = (spent | drawn & torch.zeros_like(spent).scatter(1, token, True)) & ~passed[:, None]
        at, count = torch.where(passed, node, at), count + passed
    return Verdict(path_to(at, proposal.ancestors(), proposal.depth()), count, sample(left, 1, "iid")[:, 0])


def _law_of(proposal: Proposal, node: int, spent: Tensor) -> Tensor:
    """Law of one node, float32 [B, V], given the siblings that were refused, bool [B, V]."""
    point = torch.zeros_like(spent, dtype=torch.float32).scatter(1, proposal.tokens[:, node, None], 1.0)
    if proposal.drawn is None:
        return point
    q = proposal.q(proposal.parent[:, node, None].clamp(min=0))[:, 0]
    if proposal.law == "without_replacement":
        q = q * ~spent
        q = q / q.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return torch.where(proposal.drawn[:, node, None], q, point)
