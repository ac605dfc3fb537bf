"""The model while it drafts for itself: a chain for each row, on scratch, with less to do.

Shapes: B rows, V tokens.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.pipelines.causal.attention import attach as attach_attention
from hasten.pipelines.decode_own.own_model import OwnModel
from hasten.pipelines.decode_own.scratch import decoder, scratch, step
from hasten.pipelines.decode_own.standing import Standing
from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, DrafterState, Facts, Prefill
from hasten.samplers.decode.tree import Tree
from hasten.samplers.drafters_own.trees import usable


class OwnModelState(DrafterState):
    """The state of an `OwnModel`: one chain for each row, all of one length."""

    def __init__(self, part: OwnModel, facts: Facts) -> None:
        self.part, self.facts = part, facts
        self.skip = None if part.skip is None else part.skip.start(len(decoder(facts.host).layers))
        self.standing = None if part.skip is None or self.skip is None else Standing(facts.host, self.skip, part.skip.ffn)

    def begin(self, prefill: Prefill, context: Context) -> None:
        if self.skip is not None:
            self.skip.prompt(prefill.hidden, prefill.mask)

    def propose(self, context: Context, nodes: int) -> Proposal:
        steps = min(nodes, context.reach)
        if steps < 1:
            return nothing(context.last)
        law: Literal["iid", "point"] = "iid" if self.facts.sampled else "point"
        tree = Tree(context.last, law=law, warp=self.facts.warp, sources=(self.part.kind,))
        with self.drafting():
            node = torch.zeros_like(context.last)[:, None]
            for depth in range(1, steps + 1):
                self.place(context, depth)
                laws = tree.know(node, step(self.facts.host, self.facts.tail, tree.proposal())[:, -1:])
                node = self._grow(tree, node, laws, usable(context, torch.full_like(node, depth)))
        return tree.proposal()

    def drafting(self) -> ExitStack:
        """While open, the model is the one that drafts, on scratch."""
        stack = ExitStack()
        stack.enter_context(scratch(self.facts.tail))
        if self.standing is not None:
            stack.enter_context(self.standing.open())
        if self.part.attention is not None:
            stack.enter_context(attach_attention(self.facts.host, self.part.attention))
        return stack

    def place(self, context: Context, depth: int) -> None:
        """The next step reads a token `depth` - 1 places behind the last one."""
        if self.standing is not None:
            self.standing.token(max(map(len, context.texts)) + depth - 2)

    def _grow(self, tree: Tree, node: Tensor, laws: Tensor, room: Tensor) -> Tensor:
        where = room & (laws.amax(-1) >= self.part.sure) if self.part.sure else room
        grow: Any = tree.draw if self.facts.sampled else tree.top
        found: Tensor = grow(node, 1, where)
        return found
