"""Nodes that ask: inputs behind a token that are read and never verified, and whose logits say what comes later.

Which of the accepted path's ends they stand behind is not known when they are read, so they stand behind the likeliest
ends. Where none stands behind the actual end, a round has no drafts.

Shapes: B rows, N nodes, A anchors (nodes that are asked behind), P distances, E members, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Outcome
from hasten.samplers.drafters_own.trees import last_node


@dataclass(frozen=True, eq=False)
class Asked:
    """Where the asking nodes of a proposal are. first: number of the first of them; behind each anchor (int64 [B, A], usable
    bool [B, A]) follow P x E nodes, distance by distance."""

    first: int
    anchors: Tensor
    usable: Tensor
    distances: int
    members: int

    def behind(self, outcome: Outcome) -> tuple[Tensor, Tensor]:
        """The asking nodes behind the end of the accepted path, int64 [B, P, E], and in which rows there are any, bool [B]."""
        hit = (self.anchors == last_node(outcome)[:, None]) & self.usable
        block = self.distances * self.members
        begin = self.first + hit.long().argmax(1) * block
        index = begin[:, None] + torch.arange(block, device=begin.device)
        return index.view(-1, self.distances, self.members), hit.any(1)


def split(nodes: int, distances: int, members: int, drafts: int) -> tuple[int, int, int, int]:
    """How `nodes` are shared: (drafts, anchors, distances, members). One chain of asking nodes comes first, shortened so that a
    fourth of the nodes, and one of two, can be drafts; then `drafts`, and more anchors from what is left."""
    distances = max(1, min(distances, nodes - 1))
    members = max(1, min(members, (nodes - min(drafts, nodes // 4)) // distances))
    left = max(0, nodes - distances * members)
    made = min(drafts, left)
    return made, 1 + (left - made) // (distances * members), distances, members


def with_questions(drafts: Proposal, vectors: Tensor, anchors: int) -> tuple[Proposal, Asked]:
    """`drafts` with asking nodes behind the `anchors` likeliest ends of what will be accepted. vectors [P, E, C]: their inputs;
    member e at distance i + 1 stands behind member e at distance i. A node is the end with its own chance, less that of its
    children."""
    (distances, members), (rows, size) = vectors.shape[:2], drafts.tokens.shape
    score = torch.ones_like(drafts.tokens, dtype=torch.float32) if drafts.score is None else drafts.score
    alive = score * drafts.valid
    children = torch.zeros_like(alive).scatter_add(1, drafts.parent.clamp(min=0), alive * (drafts.parent >= 0))
    worth = torch.where(drafts.valid, (alive - children).clamp(min=0) + 1e-6, -1.0)
    best, place = worth.topk(min(anchors, size), 1)
    usable = best > 0
    count, block = place.shape[1], distances * members
    behind = torch.arange(count * block, device=place.device)
    number = behind % block
    above = torch.where(number < members, place.repeat_interleave(block, 1), size + behind - members)
    there = usable.repeat_interleave(block, 1)
    wide = torch.zeros(rows, size + count * block, vectors.shape[2], dtype=vectors.dtype, device=vectors.device)
    wide[:, size:] = vectors.flatten(0, 1).repeat(count, 1)
    prompt = torch.zeros(rows, size + count * block, dtype=torch.bool, device=place.device)
    prompt[:, size:] = True
    made = Proposal(
        F.pad(drafts.tokens, (0, count * block)), torch.cat([drafts.parent, above], 1), torch.cat([drafts.valid, there], 1),
        F.pad(score, (0, count * block)), sources=drafts.sources, prompt=prompt, vectors=wide,
    )  # fmt: skip
    return made, Asked(size, place, usable, distances, members)
