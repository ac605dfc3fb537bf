"""A target and a drafter whose laws are tables: what follows a token depends on that token alone, so that everything that may
be written can be counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.samplers.decode.draws import Law
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Facts, Verifier
from hasten.samplers.decode.tree import Tree
from hasten.testing import Agreement, Cell, compare

TOKENS, RUNS = 6, 20_000


def tables(seed: int) -> tuple[Tensor, Tensor]:
    """The model's law behind every token, and the drafter's: alike, but not very, and without some tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(TOKENS, TOKENS, generator=generator)
    other = logits + 1.2 * torch.randn(TOKENS, TOKENS, generator=generator)
    logits[torch.rand(TOKENS, TOKENS, generator=generator) < 0.15] = -torch.inf
    return logits.softmax(-1), other.softmax(-1)


@dataclass
class TableTarget:
    """A `Target`: the model's law behind every node of a proposal."""

    proposal: Proposal
    table: Tensor
    sampled: bool = True

    def best(self) -> Tensor:
        return self.law().argmax(-1)

    def law(self) -> Tensor:
        return self.table[self.proposal.tokens]


def grown(table: Tensor, law: Law, widths: tuple[int, ...], rows: int = RUNS, *, points: int = 0, ragged: bool = False) -> Proposal:
    """A tree with so many children on each level, drawn from the drafter's law or its best as points. points: so many of the
    best tokens are added behind node 0 before the others are drawn. ragged: every third row drafts nothing, every other third
    one level only."""
    tree = Tree(torch.zeros(rows, dtype=torch.long), law=law)
    level = torch.zeros(rows, 1, dtype=torch.long)
    kind = torch.arange(rows) % 3
    for depth, width in enumerate(widths):
        tree.know(level, table[tree.tokens.gather(1, level)].log())
        where = (kind > depth)[:, None].expand_as(level) if ragged else None
        extra = [tree.top(level, points, where)] if points and not depth else []
        new = tree.top(level, width, where) if law == "point" else tree.draw(level, width, where)
        level = torch.cat([*extra, new], 1)
    return tree.proposal()


def extended(table: Tensor, steps: int, rows: int = RUNS, *, ragged: bool = False) -> Proposal:
    """A chain by `Tree.extend`, of which a verifier may decide as a whole. ragged: as in `grown`."""
    tree = Tree(torch.zeros(rows, dtype=torch.long), law="iid")
    kind = torch.arange(rows) % 3
    for step in range(steps):
        last = torch.full((rows, 1), tree.size - 1)
        tree.know(last, table[tree.tokens[:, -1:]].log())
        tree.extend((kind > step)[:, None] if ragged else None)
    return tree.proposal()


def agreement(verifier: Verifier, proposal: Proposal, table: Tensor) -> Agreement:
    """How well the first two tokens that are written fit the model's law."""
    facts = Facts(len(proposal.tokens), TOKENS, proposal.tokens.device, True, lambda logits, *_: logits)
    verdict = verifier.start(facts).verify(proposal, TableTarget(proposal, table))
    first = proposal.tokens.gather(1, verdict.path[:, 1:2].clamp(min=0))[:, 0] if proposal.size > 1 else verdict.token
    second = proposal.tokens.gather(1, verdict.path[:, 2:3].clamp(min=0))[:, 0] if proposal.size > 2 else verdict.token
    first = torch.where(verdict.count >= 1, first, verdict.token)
    free = torch.multinomial(table[first], 1)[:, 0]  # where one token was written, the next round has the second
    second = torch.where(verdict.count >= 2, second, torch.where(verdict.count == 1, verdict.token, free))
    seen = Counter[Cell](map(tuple, torch.stack([first, second], 1).tolist()))
    start, drafted = table[0], int(proposal.verified.sum())
    law = {(a, b): float(start[a] * table[a, b]) for a in range(TOKENS) for b in range(TOKENS) if start[a] * table[a, b] > 0}
    return compare(law, seen, float(verdict.count.sum()) / max(1, drafted))
