"""Self-speculation: the model drafts for itself with layers, feed-forward blocks or keys left out, and the whole of it verifies.

The draft's keys and values are scratch: layers that saw another input than they will when verified have written them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.errors import RecipeError
from hasten.pipelines.causal.attention import attach as attach_attention
from hasten.pipelines.decode_own.scratch import decoder, scratch, step
from hasten.pipelines.decode_own.standing import Standing
from hasten.samplers.decode.proposal import Proposal, Tree, nothing
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Prefill
from hasten.samplers.drafters_own.skip import Skip
from hasten.samplers.drafters_own.trees import usable
from hasten.sparse_attn.text.causal import CausalAttention


class OwnModel(Drafter):
    """The model itself, with less to do (self-speculative decoding, Zhang et al., arXiv 2309.08168; LayerSkip, arXiv 2404.16710).

    skip: layers or feed-forward blocks that are left out. attention: which keys of the cache the draft reads, for one row (with
    more of them, of different lengths, a draft reads all keys). sure: a draft of less chance than this is the last of its row.
    """

    kind: ClassVar[str] = "own-model"
    nodes: int = Field(4, ge=1)
    skip: Skip | None = None
    attention: CausalAttention | None = None
    sure: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_something_out(self) -> OwnModel:
        if self.skip is None and self.attention is None:
            raise RecipeError("own-model: the draft would cost what the model costs. Give skip, attention or both.")
        return self

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # of a part that reads a file, known when it is read
        return frozenset() if self.skip is None else self.skip.needs

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "chain"

    def start(self, facts: Facts) -> DrafterState:
        return OwnModelState(self, facts)


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
