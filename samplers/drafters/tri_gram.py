"""ADED: a tri-gram matrix that adapts to the model, and a search through it that weighs depth against width (arXiv 2407.12021)."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill
from hasten.samplers.drafters.host_tree import HostState, HostTree

KEEP = "tri-gram"
"""Name of the matrix in `Facts.kept`."""


class TriGram(Drafter):
    """What the model last thought behind two tokens, for every two tokens that were written, and drafts by search (ADED).

    rate: how far the matrix moves to what was seen: in the prompt the token that followed, in what is written the model's own
    `top` most probable tokens behind each accepted one. explore: the search's weight of chances that were not tried, against
    what was found (PUCT). keep: the matrix stays for the next call of `generate`, until the session is closed.

    Differs: the paper fills its matrix from a corpus beforehand; here the prompt does, and pairs that were never seen are
    answered by the last token alone.
    """

    kind: ClassVar[str] = "tri-gram"
    nodes: int = Field(16, ge=1)
    rate: float = Field(0.7, gt=0, le=1)
    top: int = Field(6, ge=1)
    explore: float = Field(1.0, ge=0)
    keep: bool = False

    def start(self, facts: Facts) -> DrafterState:
        matrix = facts.kept.setdefault(KEEP, Matrix(self.rate, self.top)) if self.keep else Matrix(self.rate, self.top)
        return _TriGramState(self, matrix)


class Matrix:
    """Sparse laws behind one and two tokens: token -> probability, the `top` largest."""

    def __init__(self, rate: float, top: int) -> None:
        self.rate, self.top = rate, top
        self.laws: dict[tuple[int, ...], dict[int, float]] = {}

    def move(self, before: tuple[int, int], seen: dict[int, float]) -> None:
        """Move the laws behind two tokens, and behind the second alone, towards `seen`."""
        for key in (before, before[1:]):
            law = self.laws.get(key)
            if law is None:
                self.laws[key] = dict(seen)
                continue
            for token in law:
                law[token] *= 1 - self.rate
            for token, chance in seen.items():
                law[token] = law.get(token, 0.0) + self.rate * chance
            if len(law) > self.top:
                best = sorted(law, key=law.__getitem__, reverse=True)[: self.top]
                self.laws[key] = {token: law[token] for token in best}

    def after(self, before: list[int]) -> dict[int, float]:
        """Law behind the last two of `before`; half as sure where only the last is known."""
        found = self.laws.get(tuple(before[-2:]))
        if found is None:
            found = {token: chance / 2 for token, chance in self.laws.get(tuple(before[-1:]), {}).items()}
        return found


class _TriGramState(HostState):
    sources = ("tri-gram",)

    def __init__(self, drafter: TriGram, matrix: Matrix) -> None:
        self.drafter, self.matrix = drafter, matrix

    def begin(self, prefill: Prefill, context: Context) -> None:
        for text in context.texts:
            for place in range(2, len(text)):
                self.matrix.move((text[place - 2], text[place - 1]), {text[place]: 1.0})

    def observe(self, outcome: Outcome, context: Context) -> None:
        """Waits for the device: the model's most probable tokens behind what was written."""
        path = outcome.verdict.path.clamp(min=0)
        logits = outcome.logits.gather(1, path[..., None].expand(-1, -1, outcome.logits.shape[-1]))
        chance, tokens = logits.float().softmax(-1).topk(min(self.drafter.top, logits.shape[-1]), -1)
        chances, best = chance.tolist(), tokens.tolist()
        for row, (text, length) in enumerate(zip(context.texts, outcome.lengths, strict=True)):
            for step in range(length):
                place = len(text) - length + step
                if place >= 2:
                    law = dict(zip(best[row][step], chances[row][step], strict=True))
                    self.matrix.move((text[place - 2], text[place - 1]), law)

    def grow(self, row: int, text: list[int], tree: HostTree) -> None:
        Search(self.matrix, text[-2:], tree, self.drafter.explore).run()


class Search:
    """Monte-Carlo tree search without chance: each walk goes down where Q + explore P sqrt(N) / (1 + n) is largest and makes
    one node; its chance of standing is what the walk was worth."""

    def __init__(self, matrix: Matrix, tail: list[int], tree: HostTree, explore: float) -> None:
        self.matrix, self.tree, self.explore = matrix, tree, explore
        self.paths, self.visits, self.worth = {0: tail}, {0: 0}, {0: 0.0}
        self.laws = {0: self._law(0)}
        self.nodes: dict[tuple[int, int], int] = {}

    def run(self) -> None:
        for _ in range(4 * self.tree.left):
            if not self.tree.left or not self._walk():
                return

    def _walk(self) -> bool:
        at, line = 0, [0]
        while self.laws[at]:
            token = self._best(at)
            node = self.nodes.get((at, token))
            if node is None:
                made = self.tree.child(at, token, min(1.0, self.laws[at][token]))
                if made is None:
                    break
                self.nodes[at, token] = made
                self.paths[made] = [*self.paths[at][-1:], token]
                self.visits[made], self.worth[made] = 0, 0.0
                self.laws[made] = self._law(made)
                line.append(made)
                break
            at = node
            line.append(at)
        value = self.tree.score[line[-1]]
        for node in line:
            self.visits[node] += 1
            self.worth[node] += value
        return bool(self.laws[0])

    def _best(self, at: int) -> int:
        whole = math.sqrt(self.visits[at] + 1)

        def promise(token: int) -> float:
            node, chance = self.nodes.get((at, token)), self.laws[at][token] * self.tree.score[at]
            if node is None:
                return self.explore * chance * whole
            return self.worth[node] / self.visits[node] + self.explore * chance * whole / (1 + self.visits[node])

        return max(self.laws[at], key=promise)

    def _law(self, node: int) -> dict[int, float]:
        return self.matrix.after(self.paths[node]) if self.tree.depths[node] < self.tree.depth else {}

