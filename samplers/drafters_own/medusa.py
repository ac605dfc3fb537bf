"""Medusa heads as a drafter: each says one of the tokens behind the next one, all from the state that said the next one.

Shapes: B rows, C channels, K heads, V tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, DrafterState, Facts, Outcome, Prefill
from hasten.samplers.drafters_own.student import Student
from hasten.samplers.drafters_own.trees import Ranks, along, at_node, grown, last_node, ranked

STATE = "hidden:-1"

ACCURACY = ((0.55, 0.14, 0.07, 0.04), (0.38, 0.12, 0.06, 0.04), (0.28, 0.1, 0.05, 0.03), (0.22, 0.08, 0.05, 0.03))
"""How often the best guess, the second best and so on of each head is right, for the static tree: rounded from Medusa's own
tables. The order of magnitude is all that the tree needs."""


class Medusa(Student):
    """Heads of `hasten train medusa` (arXiv 2401.10774): head i is h + SiLU(W_i h), read by the model's own last layer.

    tree: "ranked" takes the most probable paths of each round, "static" those of the same ranks every time, as the paper does.
    width: guesses of each head. Differs: the paper's heads have last layers of their own.
    """

    kind: ClassVar[str] = "medusa"
    file: ClassVar[str] = "medusa_heads.safetensors"
    training: ClassVar[str] = "medusa"
    needs: ClassVar[frozenset[str]] = frozenset({STATE})
    nodes: int = Field(12, ge=1)
    tree: Literal["ranked", "static"] = "ranked"
    width: int = Field(6, ge=1)

    def start(self, facts: Facts) -> DrafterState:
        return _MedusaState(self, facts)


class _MedusaState(DrafterState):
    def __init__(self, part: Medusa, facts: Facts) -> None:
        self.part = part
        self.last: Any = facts.host.get_output_embeddings()
        first = next(self.last.parameters())
        tensors = part.read()
        count = len({name.split(".")[1] for name in tensors})
        self.blocks = [
            (tensors[f"blocks.{head}.weight"].to(first), tensors[f"blocks.{head}.bias"].to(first)) for head in range(count)
        ]
        part.fits(self.blocks[0][0].shape[1], facts.host)
        accuracy = [ACCURACY[min(head, len(ACCURACY) - 1)][: part.width] for head in range(count)]
        self.paths: tuple[Ranks, ...] = grown(accuracy, part.nodes) if part.tree == "static" else ()
        self.state: Tensor | None = None  # [B, C] that said the last token
        self.seen: Outcome | None = None  # of the last round, where its state was not taken yet

    def begin(self, prefill: Prefill, context: Context) -> None:
        self.state = prefill.hidden[STATE][:, -1]

    def propose(self, context: Context, nodes: int) -> Proposal:
        if self.seen is not None:
            self.state, self.seen = at_node(self.seen.hidden[STATE], last_node(self.seen)), None
        assert self.state is not None, "begin() comes first"
        if context.reach < 1:
            return nothing(context.last)
        depth = min(len(self.blocks), context.reach)
        chances, tokens = self._said(self.state, depth).softmax(-1).topk(self.part.width, -1)

        def guess(step: int, before: Tensor) -> tuple[Tensor, Tensor]:
            wide = (-1, before.shape[1], -1)
            return tokens[step - 1][:, None].expand(*wide), chances[step - 1][:, None].expand(*wide)

        if self.part.tree == "static":
            paths = [path for path in self.paths if len(path) <= depth]
            return along(context, guess, paths, nodes, self.part.kind)
        return ranked(context, guess, depth, nodes, self.part.kind)

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.seen = outcome

    def _said(self, state: Tensor, depth: int) -> Tensor:
        """Logits float32 [depth, B, V] of the first heads, for states [B, C]."""
        return torch.stack([self.last(residual(state, *block)).float() for block in self.blocks[:depth]])


def residual(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What one head gives the last layer to read: h + SiLU(W h + b), [..., C]."""
    return states + F.silu(F.linear(states, weight, bias))
