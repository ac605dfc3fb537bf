"""A proposal: drafted tokens as a tree, and the law that each of them was drawn from.

Shapes: B rows, N nodes, V tokens of the vocabulary. Node 0 is the last committed token of a row; every other node is a
guess at the token behind its parent.

A verifier that is handed the wrong law gives other texts than the model, and nobody sees it. So a law cannot be handed
over at all: nodes are either *points* (`Tree.add`), for which a verifier asks no law, or drawn by `Tree.draw`, which
samples from the very distribution that it keeps. Calling a sampled token a point is always right, only accepted less
often: whatever the point is, what is written follows the model's law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.samplers.decode.coupling import coupled

Law = Literal["point", "iid", "without_replacement"]
"""point: any way of choosing. iid: each child of a node is an independent draw. without_replacement: each is drawn from
what is left when its elder siblings are taken out."""

Warp = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Logits processors and temperature of a call: (logits [B, M, V], nodes [B, M], tokens [B, N], parent [B, N]) -> log
probabilities float32 [B, M, V]. Node n is warped with its own prefix: what is committed, then its path in the tree."""

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

    @property
    def verified(self) -> Tensor:
        """Nodes that a verifier looks at, bool [B, N]: valid, not node 0, no prompt."""
        found = self.valid & (self.parent >= 0)
        return found if self.prompt is None else found & ~self.prompt

    def ancestors(self) -> Tensor:
        """bool [B, N, N]: may node i read node j? True for itself and all nodes above it."""
        return ancestors(self.parent)

    def depth(self) -> Tensor:
        """int64 [B, N]: steps from node 0."""
        return self.ancestors().sum(-1) - 1

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
        return replace(
            self, tokens=pad(self.tokens, (0, more)), parent=pad(self.parent, (0, more)), valid=pad(self.valid, (0, more)),
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


class Tree:
    """A proposal while it grows.

    root int64 [B]: last committed token of every row. law: of the nodes that `draw` makes. warp: processors and temperature
    of the call (`Context.warp`); None: softmax alone. generator: None is PyTorch's own.

    What was drawn stays: whether to draw may depend on everything drawn before, but a drawn node cannot be taken out,
    because dropping the improbable ones would make the recorded law a lie.
    """

    def __init__(
        self, root: Tensor, *, law: Law = "iid", warp: Warp | None = None, sources: tuple[str, ...] = ("draft",),
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.law, self.warp, self.sources, self.generator = law, warp, sources, generator
        first = root[:, None]
        self.tokens, self.parent = first, torch.full_like(first, -1)
        self.valid = torch.ones_like(first, dtype=torch.bool)
        self.drawn = torch.zeros_like(self.valid)
        self.score = torch.ones_like(first, dtype=torch.float32)
        self.source = torch.zeros_like(first)
        self.slot = torch.full_like(first, -1)
        self.laws: Tensor | None = None
        self._drew = False
        self._asked: list[tuple[int, Tensor]] = []

    @property
    def size(self) -> int:
        """Nodes so far, node 0 included."""
        return self.tokens.shape[1]

    def add(
        self, parent: Tensor, tokens: Tensor, valid: Tensor | None = None, score: Tensor | None = None, source: int = 0
    ) -> Tensor:
        """Append points; returns their indices int64 [B, K].

        parent, tokens int64 [B, K], valid bool [B, K]. score float32 [B, K]: chance that the node is right if its parent is.
        """
        found = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        chance = torch.ones_like(tokens, dtype=torch.float32) if score is None else score
        return self._append(parent, tokens, found, chance, source, drawn=False)

    def know(self, node: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Say what the drafter's model thinks behind `node` int64 [B, M]: logits [B, M, V]. A node that has a law keeps it.

        Returns the law that `draw` will sample there, float32 [B, M, V]: softmax of the warped logits over `temperature`.
        """
        warped = logits.float() if self.warp is None else self.warp(logits, node, self.tokens, self.parent)
        laws = torch.softmax(warped / temperature, -1)
        before = 0 if self.laws is None else self.laws.shape[1]
        self.laws = laws if self.laws is None else torch.cat([self.laws, laws], 1)
        number = torch.arange(before, before + node.shape[1], device=node.device).expand_as(node)
        known = self.slot.gather(1, node)
        self.slot = self.slot.scatter(1, node, torch.where(known >= 0, known, number))
        return self._law(node)

    def draw(self, parent: Tensor, count: int = 1, where: Tensor | None = None, source: int = 0) -> Tensor:
        """Draw `count` children for each of `parent` int64 [B, M] from the law that `know` was told; returns their indices
        int64 [B, M * count], the children of a parent side by side. where bool [B, M]: only there. Tokens of probability 0
        are never drawn: the node is invalid then.
        """
        laws = self._law(parent)
        if self.law == "without_replacement":
            left = laws * ~self._spent(parent, laws.shape[-1])
        elif self.law == "iid":
            left = laws
        else:
            raise UsageError("Tree(law='point') draws nothing. Take law='iid' or 'without_replacement', or add points.")
        tokens = sample(left, count, self.law, self.generator)
        found = (left.gather(-1, tokens) > 0) & self._known(parent)[..., None]
        if where is not None:
            found = found & where[..., None]
        wide = parent[..., None].expand_as(tokens).flatten(1)
        return self._append(
            wide, tokens.flatten(1), found.flatten(1), laws.gather(-1, tokens).flatten(1), source, drawn=True
        )

    def redraw(
        self, parent: Tensor, before: Proposal, node: Tensor, there: Tensor, where: Tensor | None = None, source: int = 0
    ) -> Tensor:
        """One child of each of `parent` int64 [B, M], drawn as `draw` does, that is the token of `node` int64 [B, M] of an earlier
        proposal as often as their laws allow; `there` bool [B, M]: where there is such a node. Children iid only.

        Right as long as nothing was decided by that node since it was drawn, and it is used once.
        """
        if self.law != "iid":
            raise UsageError(f"Tree(law={self.law!r}) cannot draw again what was drawn before. Take law='iid'.")
        laws = self._law(parent)
        token, held = before.tokens.gather(1, node), there & before.valid.gather(1, node)
        tokens = coupled(laws, before.law_of(node, laws.shape[-1]), token, held, self.generator)
        chance = laws.gather(-1, tokens[..., None])[..., 0]
        found = (chance > 0) & self._known(parent)
        return self._append(parent, tokens, found if where is None else found & where, chance, source, drawn=True)

    def top(self, parent: Tensor, count: int = 1, where: Tensor | None = None, source: int = 0) -> Tensor:
        """The same with the `count` most probable tokens, as points; for greedy decoding."""
        chance, tokens = self._law(parent).topk(count, -1)
        found = (chance > 0) & self._known(parent)[..., None]
        if where is not None:
            found = found & where[..., None]
        wide = parent[..., None].expand_as(tokens).flatten(1)
        return self._append(wide, tokens.flatten(1), found.flatten(1), chance.flatten(1), source, drawn=False)

    def ask(self, parent: Tensor, vectors: Tensor, valid: Tensor | None = None) -> Tensor:
        """Append prompt nodes, whose inputs are `vectors` [B, K, H]; returns their indices. They are read, never verified."""
        begin = self.size
        found = torch.ones_like(parent, dtype=torch.bool) if valid is None else valid
        nodes = self._append(parent, torch.zeros_like(parent), found, torch.zeros_like(parent, dtype=torch.float32), 0, drawn=False)
        self._asked.append((begin, vectors))
        return nodes

    def proposal(self) -> Proposal:
        """What has grown."""
        prompt, vectors = self._prompts()
        told = self.laws is not None and self._drew
        return Proposal(
            self.tokens, self.parent, self.valid, self.score, self.source, self.sources, prompt, vectors,
            law=self.law if told else "point", drawn=self.drawn if told else None, _laws=self.laws if told else None,
            _slot=self.slot if told else None, _seal=_SEAL if told else None,
        )  # fmt: skip

    def _prompts(self) -> tuple[Tensor | None, Tensor | None]:
        """Which nodes are prompts, and the inputs of all nodes (zeros for the others); None where there are none."""
        if not self._asked:
            return None, None
        prompt, vectors = torch.zeros_like(self.valid), self._asked[0][1].new_zeros(*self.tokens.shape, self._asked[0][1].shape[-1])
        for begin, given in self._asked:
            prompt[:, begin : begin + given.shape[1]] = True
            vectors[:, begin : begin + given.shape[1]] = given
        return prompt, vectors

    def _append(
        self, parent: Tensor, tokens: Tensor, valid: Tensor, chance: Tensor, source: int, *, drawn: bool
    ) -> Tensor:
        begin = self.size
        valid = valid & self.valid.gather(1, parent)
        self._drew = self._drew or drawn
        self.score = torch.cat([self.score, self.score.gather(1, parent) * chance * valid], 1)
        self.tokens = torch.cat([self.tokens, tokens], 1)
        self.parent = torch.cat([self.parent, parent], 1)
        self.valid = torch.cat([self.valid, valid], 1)
        self.drawn = torch.cat([self.drawn, valid & drawn], 1)
        self.source = torch.cat([self.source, torch.full_like(tokens, source)], 1)
        self.slot = torch.cat([self.slot, torch.full_like(tokens, -1)], 1)
        return torch.arange(begin, self.size, device=tokens.device).expand_as(tokens)

    def _law(self, node: Tensor) -> Tensor:
        if self.laws is None:
            raise UsageError("Tree: nothing is known to draw from. Call know(node, logits) first.")
        slot = self.slot.gather(1, node).clamp(min=0)
        return self.laws.gather(1, slot[..., None].expand(-1, -1, self.laws.shape[2]))

    def _known(self, node: Tensor) -> Tensor:
        return self.slot.gather(1, node) >= 0

    def _spent(self, parent: Tensor, vocabulary: int) -> Tensor:
        """Tokens that were drawn behind `parent` already, bool [B, M, V]."""
        mine = (self.parent[:, None, :] == parent[..., None]) & self.drawn[:, None, :]
        counts = torch.zeros(*parent.shape, vocabulary, device=parent.device)
        tokens = self.tokens[:, None, :].expand_as(mine)
        return counts.scatter_add(-1, tokens, mine.float()) > 0


def chain(root: Tensor, tokens: Tensor, valid: Tensor, source: str = "draft") -> Proposal:
    """Points in a row: node i + 1 behind node i. root int64 [B]; tokens int64, valid bool [B, K], true from the left."""
    tree = Tree(root, law="point", sources=(source,))
    steps = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    wide = torch.cat([torch.full_like(root[:, None], -1), steps], 1)
    return Proposal(
        torch.cat([root[:, None], tokens], 1), wide, torch.cat([tree.valid, valid], 1), sources=(source,)
    )


def nothing(root: Tensor) -> Proposal:
    """No draft at all: node 0 alone. root int64 [B]."""
    first = root[:, None]
    return Proposal(first, torch.full_like(first, -1), torch.ones_like(first, dtype=torch.bool))


def ancestors(parent: Tensor) -> Tensor:
    """bool [B, N, N]: is node j node i itself, or above it? parent int64 [B, N], -1 for none. Never waits for the device."""
    nodes = parent.shape[1]
    index = torch.arange(nodes, device=parent.device)
    reach = ((parent[..., None] == index) | (index[:, None] == index)).float()
    for _ in range(max(1, math.ceil(math.log2(max(2, nodes))))):
        reach = (reach @ reach).clamp(max=1)
    return reach > 0


def path_to(node: Tensor, above: Tensor) -> Tensor:
    """Nodes from node 0 to `node` int64 [B], int64 [B, N], -1 behind it. above: `ancestors`, bool [B, N, N]."""
    nodes = above.shape[1]
    line = above.gather(1, node[:, None, None].expand(-1, 1, nodes))[:, 0]
    place = torch.where(line, above.sum(-1) - 1, nodes)
    index = torch.arange(nodes, device=node.device).expand_as(place)
    return index.new_full((len(node), nodes + 1), -1).scatter(1, place, index)[:, :nodes]


def sample(probabilities: Tensor, count: int, law: Law, generator: torch.Generator | None = None) -> Tensor:
    """Tokens int64 [..., count] drawn from `probabilities` [..., V], which need not sum to 1. Never waits for the device.

    The largest of p / Exp(1) is a draw from p, and the order of the `count` largest that of draws without replacement.
    """
    if law == "iid" and count > 1:
        probabilities = probabilities[..., None, :].expand(*probabilities.shape[:-1], count, probabilities.shape[-1])
    noise = torch.empty_like(probabilities, memory_format=torch.contiguous_format).exponential_(1.0, generator=generator)
    keys = probabilities / noise.clamp(min=torch.finfo(noise.dtype).tiny)
    if law == "iid" and count > 1:
        return keys.argmax(-1)
    return keys.topk(count, -1).indices
