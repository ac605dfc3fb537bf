"""The two drafting tiers of a cascade, while they draft.

Shapes: B rows, N nodes of the first tier's chain, V tokens.
"""

from __future__ import annotations

from typing import Literal

import torch

from hasten.pipelines.decode_own.cascade import Cascade
from hasten.pipelines.decode_own.own_state import OwnModelState
from hasten.pipelines.decode_own.scratch import step
from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, DrafterState, Facts, Outcome, Prefill
from hasten.samplers.decode.tree import Tree
from hasten.samplers.drafters_own.trees import usable


class CascadeState(DrafterState):
    """The state of a `Cascade`."""

    def __init__(self, part: Cascade, facts: Facts) -> None:
        self.part, self.facts = part, facts
        self.first, self.middle = part.first.start(facts), OwnModelState(part.middle, facts)

    def begin(self, prefill: Prefill, context: Context) -> None:
        self.first.begin(prefill, context)
        self.middle.begin(prefill, context)

    def propose(self, context: Context, nodes: int) -> Proposal:
        if min(nodes, context.reach) < 1:
            return nothing(context.last)
        cheap = self.first.propose(context, nodes - 1) if nodes > 1 else nothing(context.last)
        with self.middle.drafting():
            self.middle.place(context, cheap.size)
            logits = step(self.facts.host, self.facts.tail, cheap, cheap.size)
        return self._made(context, cheap, logits)

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.first.observe(outcome, context)

    def _made(self, context: Context, cheap: Proposal, logits: torch.Tensor) -> Proposal:
        """The middle's chain: the cheap one as far as it stands, and a token of its own. logits [B, N, V]: of the middle."""
        drawn = self.facts.sampled
        law: Literal["iid", "point"] = "iid" if drawn else "point"
        tree = Tree(context.last, law=law, warp=self.facts.warp, sources=(self.part.kind,))
        node = torch.zeros_like(context.last)[:, None]
        on = torch.ones_like(node, dtype=torch.bool)
        for depth in range(min(cheap.size, context.reach)):
            tree.know(node, logits[:, depth : depth + 1])
            follows = depth + 1 < cheap.size
            at = torch.full_like(node, depth + 1 if follows else 0)
            there = cheap.verified.gather(1, at) if follows else torch.zeros_like(on)
            room = usable(context, torch.full_like(node, depth + 1)) & on
            node = tree.redraw(node, cheap, at, there, room) if drawn else tree.top(node, 1, room)
            on = room & there & (tree.tokens.gather(1, node) == cheap.tokens.gather(1, at))
        return tree.proposal()
