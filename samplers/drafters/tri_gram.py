"""ADED: a tri-gram matrix that adapts to the model, and a search through it that weighs depth against width (arXiv 2407.12021)."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill
from hasten.samplers.drafters.host_tree import CALLS, HostState, HostTree

KEEP = "tri-gram"
"""Name of what was learnt in `Facts.kept`."""

NUMBERS = 1 << 20
"""Logits that wait to be learnt from, at most; 4 MiB. Those of the last round always do."""


class TriGram(Drafter):
    """What the model last thought behind two tokens, for every two tokens that were written, and drafts by search (ADED).

    rate: how far the matrix moves to what was seen: in the prompt the token that followed, in what is written the model's own
    `top` most probable tokens behind each accepted one. explore: the search's weight of chances that were not tried, against
    what was found (PUCT). keep: the matrix stays for the next call of `generate`, until the session is closed.

    Nothing is learnt before drafts are asked for: rounds without drafts cost nothing. Until then the last `NUMBERS` logits are kept,
    and the texts of the last `CALLS` calls; what was written before these logits is learnt from its tokens alone, as the prompt is.

    Differs: the paper fills its matrix from a corpus beforehand; here the prompt does, and pairs that were never seen are
    answered by the last token alone.
    """

    kind: ClassVar[str] = "tri-gram"
    weighs: ClassVar[bool] = True
    nodes: int = Field(16, ge=1)
    rate: float = Field(0.7, gt=0, le=1)
    top: int = Field(6, ge=1)
    explore: float = Field(1.0, ge=0)
    keep: bool = False

    def start(self, facts: Facts) -> DrafterState:
        learnt = facts.kept.setdefault(KEEP, Learnt(self)) if self.keep else Learnt(self)
        return _TriGramState(self, learnt).weighed(self, facts)


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


@dataclass(frozen=True, eq=False)
class _Round:
    """logits, path, lengths: as in an `Outcome`. ends: where it ended in each text."""

    logits: Tensor
    path: Tensor
    lengths: list[int]
    ends: list[int]


class _Call:
    """What one call of `generate` wrote and was not learnt yet. known: tokens of each text that were; rounds: the last ones;
    numbers: of logits in them."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts, self.known = texts, [0] * len(texts)
        self.rounds = deque[_Round]()
        self.numbers = 0

    def add(self, outcome: Outcome, texts: list[list[int]]) -> None:
        self.texts = texts
        self.rounds.append(_Round(outcome.logits, outcome.verdict.path, outcome.lengths, [len(text) for text in texts]))
        self.numbers += outcome.logits.numel()

    def drop(self) -> None:
        """Forget the first round's logits; what it wrote stays in the texts."""
        self.numbers -= self.rounds.popleft().logits.numel()


class Learnt:
    """A matrix, and what it will be moved to when drafts are asked for."""

    def __init__(self, drafter: TriGram) -> None:
        self.drafter, self.matrix = drafter, Matrix(drafter.rate, drafter.top)
        self._calls = deque[_Call](maxlen=CALLS)

    def begin(self, texts: list[list[int]]) -> None:
        """Prompts, and the first token behind each."""
        self._calls.append(_Call(texts))

    def saw(self, outcome: Outcome, texts: list[list[int]]) -> None:
        """What became of a round."""
        left = NUMBERS - outcome.logits.numel()
        for call in reversed(self._calls):
            while call.rounds and call.numbers > left:
                call.drop()
            left -= call.numbers
        self._calls[-1].add(outcome, texts)

    def learn(self) -> None:
        """Move the matrix to all that was seen. Waits for the device: the model's most probable tokens behind what was written."""
        for call in self._calls:
            said = [self._said(each) for each in call.rounds]
            for each, (chance, tokens) in zip(call.rounds, said, strict=True):
                self._tokens(call, [end - length for end, length in zip(each.ends, each.lengths, strict=True)])
                self._laws(call, each, chance.tolist(), tokens.tolist())
            self._tokens(call, [len(text) for text in call.texts])
            call.rounds.clear()
            call.numbers = 0
        while len(self._calls) > 1:
            self._calls.popleft()

    def _said(self, each: _Round) -> tuple[Tensor, Tensor]:
        """Chances [B, D, top] of the best tokens behind each node of the path, and these."""
        path = each.path.clamp(min=0)
        logits = each.logits.gather(1, path[..., None].expand(-1, -1, each.logits.shape[-1]))
        chance, tokens = logits.float().softmax(-1).topk(min(self.drafter.top, logits.shape[-1]), -1)
        return chance, tokens

    def _tokens(self, call: _Call, ends: list[int]) -> None:
        """Move to what stands in the texts, up to `ends`."""
        for row, (text, end) in enumerate(zip(call.texts, ends, strict=True)):
            for place in range(max(2, call.known[row]), end):
                self.matrix.move((text[place - 2], text[place - 1]), {text[place]: 1.0})
            call.known[row] = end

    def _laws(self, call: _Call, each: _Round, chances: list[list[list[float]]], best: list[list[list[int]]]) -> None:
        """Move to what the model thought in a round."""
        for row, (text, end, length) in enumerate(zip(call.texts, each.ends, each.lengths, strict=True)):
            for step in range(length):
                place = end - length + step
                if place >= 2:
                    law = dict(zip(best[row][step], chances[row][step], strict=True))
                    self.matrix.move((text[place - 2], text[place - 1]), law)
            call.known[row] = end


class _TriGramState(HostState):
    sources = ("tri-gram",)

    def __init__(self, drafter: TriGram, learnt: Learnt) -> None:
        self.drafter, self.learnt = drafter, learnt

    def begin(self, prefill: Prefill, context: Context) -> None:
        self.learnt.begin(context.texts)

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.learnt.saw(outcome, context.texts)

    def propose(self, context: Context, nodes: int) -> Proposal:
        self.learnt.learn()
        return super().propose(context, nodes)

    def grow(self, row: int, text: list[int], tree: HostTree) -> None:
        Search(self.learnt.matrix, text[-2:], tree, self.drafter.explore).run()


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

