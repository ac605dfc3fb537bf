"""A proposal: drafted tokens as a tree, and the law that each of them was drawn from.

Shapes: B rows, N nodes, V tokens of the vocabulary. Node 0 is the last committed token of a row; every other node is a
guess at the token behind its parent.

A verifier that is handed the wrong law gives other texts than the model, and nobody sees it. So a law cannot be handed
over at all: nodes are either *points* (`Tree.add`), for which a verifier asks no law, or drawn by `Tree.draw`, which
samples from the very distribution that it keeps. Calling a sampled token a point is always right, only accepted less
often: whatever the point is, what is written follows the model's law.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.samplers.decode.draws import Law
from hasten.samplers.decode.paths import ancestors

_SEAL = object()


@dataclass(frozen=True, eq=False)
class Proposal:
    """A token tree of every row.

    tokens int64 [B, N]. parent int64 [B, N]: smaller than the node's own index; -1 for node 0. valid bool [B, N]: rows have
    different trees; node 0 is valid, children of invalid nodes are not. score float32 [B, N]: estimated probability that
    the node survives. source int64 [B, N]: which of `sources` made it. prompt bool [B, N]: nodes that are read and never
    verified (prompt tokens of parallel decoding); `vectors` [B, N, H] are then their inputs in place of embeddings.
    drawn bool [B, N]: the node was drawn by `Tree.draw`; the others are points. law: of the drawn ones.

    A proposal of points may be made directly; one with drawn nodes comes from a `Tree`, and `q` tells its laws. Raises
    `UsageError` for shapes that do not agree, and for laws from anywhere else.
    """

    tokens: Tensor
    parent: Tensor
    valid: Tensor
    score: Tensor | None = None
    source: Tensor | None = None
    sources: tuple[str, ...] = ("draft",)
    prompt: Tensor | None = None
    vectors: Tensor | None = None
    law: Law = "point"
    drawn: Tensor | None = None
    _laws: Tensor | None = None  # [B, S, V]: one for each node that had children drawn
    _slot: Tensor | None = None  # int64 [B, N]: which of them is the node's
    _line: Tensor | None = None  # the very `parent` of a chain that `Tree.extend` drew; another one is none
    _seal: object = None

    def __post_init__(self) -> None:
        shape = tuple(self.tokens.shape)
        for name in ("parent", "valid", "score", "source", "prompt", "drawn"):
            each = getattr(self, name)
            if each is not None and tuple(each.shape) != shape:
                raise UsageError(f"Proposal: {name} is {tuple(each.shape)} where tokens are {shape}; all are [rows, nodes].")
        if len(shape) != 2 or not shape[1]:
            raise UsageError(f"Proposal: tokens are {shape}, and have to be [rows, nodes] with the last committed token first.")
        told = self.law != "point" or self.drawn is not None or self._laws is not None
        if told and self._seal is not _SEAL:
            raise UsageError(
                f"Proposal: law={self.law!r} was given from outside. Draw the tokens with Tree.draw, which samples from the law"
                " that it records, or propose them as points: that is right for tokens chosen in any way."
            )

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def size(self) -> int:
        """Nodes of a row, node 0 included."""
        return self.tokens.shape[1]

    def q(self, node: Tensor) -> Tensor:
        """Probabilities float32 [B, K, V] from which the children of `node` int64 [B, K] were drawn; zeros where none were."""
        if self._laws is None or self._slot is None:
            raise UsageError("This proposal has points only, and points have no law. Ask `law` first.")
        slot = self._slot.gather(1, node)
        laws = self._laws.gather(1, slot.clamp(min=0)[..., None].expand(-1, -1, self._laws.shape[2]))
        return laws * (slot >= 0)[..., None]

    def law_of(self, node: Tensor, vocabulary: int) -> Tensor:
        """What `node` int64 [B, K] was drawn from, float32 [B, K, V]; a point's law is 1 for itself."""
        shape = (*node.shape, vocabulary)
        point = torch.zeros(shape, device=node.device).scatter(-1, self.tokens.gather(1, node)[..., None], 1.0)
        if self.drawn is None:
            return point
        return torch.where(self.drawn.gather(1, node)[..., None], self.q(self.parent.gather(1, node).clamp(min=0)), point)

    @cached_property
    def verified(self) -> Tensor:
        """Nodes that a verifier looks at, bool [B, N]: valid, not node 0, no prompt."""
        found = self.valid & (self.parent >= 0)
        return found if self.prompt is None else found & ~self.prompt

    @property
    def straight(self) -> bool:
        """Was all of it drawn by `Tree.extend`, node i + 1 behind node i? Known without waiting for the device."""
        return self._line is not None and self._line is self.parent

    def ancestors(self) -> Tensor:
        """bool [B, N, N]: may node i read node j? True for itself and all nodes above it."""
        return self._above

    def depth(self) -> Tensor:
        """int64 [B, N]: steps from node 0."""
        return self._depth

    @cached_property
    def _above(self) -> Tensor:
        return ancestors(self.parent)

    @cached_property
    def _depth(self) -> Tensor:
        return self._above.sum(-1) - 1

    def is_chain(self) -> bool:
        """Has every node one child at most, in every row? Waits for the device."""
        children = torch.zeros_like(self.parent).scatter_add(1, self.parent.clamp(min=0), self.verified.long())
        return bool((children <= 1).all())

    def widened(self, nodes: int) -> Proposal:
        """The same with nodes that are not valid behind it, so that it has `nodes` of them; for fixed shapes."""
        more = nodes - self.size
        if more <= 0:
            return self

        def wide(each: Tensor | None, value: int = 0) -> Tensor | None:
            return None if each is None else torch.nn.functional.pad(each, (0, more), value=value)

        pad = torch.nn.functional.pad
        parent = pad(self.parent, (0, more))
        return replace(
            self, tokens=pad(self.tokens, (0, more)), parent=parent, _line=parent if self.straight else None, valid=pad(self.valid, (0, more)),
            score=wide(self.score), source=wide(self.source), prompt=wide(self.prompt), drawn=wide(self.drawn),
            vectors=None if self.vectors is None else pad(self.vectors, (0, 0, 0, more)), _slot=wide(self._slot, -1),
        )  # fmt: skip

    def check(self, vocabulary: int) -> None:
        """Raise `UsageError` where the contents make no tree of tokens below `vocabulary`. Waits for the device: for tests,
        and for drafters that come from outside."""
        index = torch.arange(self.size, device=self.parent.device)
        above = self.valid.gather(1, self.parent.clamp(min=0)) | (self.parent < 0)
        wrong = {
            "node 0 is the last committed token, valid and with parent -1": (self.parent[:, 0] != -1) | ~self.valid[:, 0],
            "a parent stands before its children": ((self.parent >= index) | ((self.parent < 0) & (index > 0))).any(1),
            "the parent of a valid node is valid": (self.valid & ~above).any(1),
            f"tokens are below {vocabulary}": (self.valid & ((self.tokens < 0) | (self.tokens >= vocabulary))).any(1),
        }
        for rule, rows in wrong.items():
            if bool(rows.any()):
                raise UsageError(f"Proposal: {rule}; row {int(rows.long().argmax())} breaks this. The drafter has to be fixed.")


def chain(root: Tensor, tokens: Tensor, valid: Tensor, source: str = "draft") -> Proposal:
    """Points in a row: node i + 1 behind node i. root int64 [B]; tokens int64, valid bool [B, K], true from the left."""
    steps = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    wide = torch.cat([torch.full_like(root[:, None], -1), steps], 1)
    there = torch.cat([torch.ones_like(wide[:, :1], dtype=torch.bool), valid], 1)
    return Proposal(torch.cat([root[:, None], tokens], 1), wide, there, sources=(source,))


def nothing(root: Tensor) -> Proposal:
    """No draft at all: node 0 alone. root int64 [B]."""
    first = root[:, None]
    return Proposal(first, torch.full_like(first, -1), torch.ones_like(first, dtype=torch.bool))
