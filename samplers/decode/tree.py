"""A proposal while it grows: nodes are added as points, or drawn from the law that is kept beside them.

Shapes: B rows, N nodes, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.samplers.decode.coupling import coupled
from hasten.samplers.decode.draws import Law, sample
from hasten.samplers.decode.proposal import _SEAL, Proposal

Warp = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Logits processors and temperature of a call: (logits [B, M, V], nodes [B, M], tokens [B, N], parent [B, N]) -> log
probabilities float32 [B, M, V]. Node n is warped with its own prefix: what is committed, then its path in the tree."""


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
        self._drew, self._straight = False, True
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

    def extend(self, where: Tensor | None = None, source: int = 0) -> Tensor:
        """One child of the last node of each row, drawn as `draw` does; returns their indices int64 [B, 1]. where bool [B, 1]:
        only there; a row that was left out once has no more of them.

        A tree that is made by this alone is a chain of which a verifier may decide as a whole (`Proposal.straight`).
        """
        straight = self._straight
        node = self.draw(torch.full_like(self.tokens[:, :1], self.size - 1), 1, where, source)
        self._straight = straight
        return node

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
            _slot=self.slot if told else None, _seal=_SEAL if told else None, _line=self.parent if told and self._straight else None,
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
        self._straight = False
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
