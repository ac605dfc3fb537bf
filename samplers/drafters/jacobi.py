"""Jacobi decoding: a window of guesses that the model corrects all at once, round after round, up to its fixed point."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill
from hasten.samplers.drafters.host_tree import HostState, HostTree


class Jacobi(Drafter):
    """What the model said behind last round's guesses is this round's guess (Jacobi decoding, arXiv 2305.10427), and runs of
    tokens that came up on the way are tried beside it (lookahead decoding, arXiv 2402.02057).

    window: guesses in a row, at most `nodes`. run: tokens of a run in the pool. pool: runs for each first token, the latest
    ones; 0 for none, a chain. Guesses are the model's most probable tokens, also where it samples.

    Differs: lookahead decoding has a window of two dimensions, whose guesses are made beside the verified tokens; here the
    guesses are those that are verified.
    """

    kind: ClassVar[str] = "jacobi"
    nodes: int = Field(12, ge=1)
    window: int = Field(6, ge=1)
    run: int = Field(4, ge=2)
    pool: int = Field(3, ge=0)

    def start(self, facts: Facts) -> DrafterState:
        return _JacobiState(self, facts.rows)


WINDOW, POOL = 0, 1


@dataclass(frozen=True, eq=False)
class _Round:
    """What became of a window, on the device. best int64 [B, N]: the model's tokens behind the nodes; mine bool [B, N]: the window's
    nodes; lengths, ends: what was written, and where it ended in each text."""

    parent: Tensor
    mine: Tensor
    best: Tensor
    lengths: list[int]
    ends: list[int]


class _JacobiState(HostState):
    """known: tokens of each text whose runs are in the pool. last: the last window, where nobody looked at it yet."""

    sources = ("jacobi", "jacobi-pool")

    def __init__(self, drafter: Jacobi, rows: int) -> None:
        self.drafter = drafter
        self.guesses: list[list[int]] = [[] for _ in range(rows)]
        self.runs: dict[int, deque[tuple[int, ...]]] = {}
        self.known: list[int] = []
        self.last: _Round | None = None

    def begin(self, prefill: Prefill, context: Context) -> None:
        self.known = [len(text) for text in context.texts]

    def observe(self, outcome: Outcome, context: Context) -> None:
        proposal = outcome.proposal
        if proposal.source is None or "jacobi" not in proposal.sources:
            return
        mine = proposal.verified & (proposal.source == proposal.sources.index("jacobi"))
        ends = [len(text) for text in context.texts]
        self.last = _Round(proposal.parent, mine, outcome.logits.argmax(-1), outcome.lengths, ends)

    def propose(self, context: Context, nodes: int) -> Proposal:
        if self.last is not None:
            self._corrected(self.last, context.texts)
            self.last = None
        for row, text in enumerate(context.texts):
            if len(text) > self.known[row]:  # rounds without a window
                self.guesses[row] = []
                self._remember(text[self.known[row] - 1 :])
                self.known[row] = len(text)
        return super().propose(context, nodes)

    def _corrected(self, last: _Round, texts: list[list[int]]) -> None:
        """Waits for the device: the model's best tokens behind the window."""
        parents, mine, best = torch.stack([last.parent, last.mine.long(), last.best]).tolist()
        for row, (text, length, end) in enumerate(zip(texts, last.lengths, last.ends, strict=True)):
            line, at = [0], 0
            for node in range(1, len(parents[row])):
                if mine[row][node] and parents[row][node] == at:
                    at = node
                    line.append(node)
            said = [best[row][node] for node in line]  # said[i]: of the token that is i + 1 behind the old last one
            self.guesses[row] = said[length:]
            self._remember(text[end - length - 1 : end] + self.guesses[row])
            self.known[row] = end

    def _remember(self, tokens: list[int]) -> None:
        size = self.drafter.run
        for place in range(len(tokens) - size + 1 if self.drafter.pool else 0):
            kept = self.runs.setdefault(tokens[place], deque(maxlen=self.drafter.pool))
            run = tuple(tokens[place + 1 : place + size])
            if run in kept:
                kept.remove(run)
            kept.append(run)

    def grow(self, row: int, text: list[int], tree: HostTree) -> None:
        window = min(self.drafter.window, tree.left)
        tree.line((self.guesses[row] + [text[-1]] * window)[:window], 0.5, WINDOW)
        for run in reversed(self.runs.get(text[-1], ())):
            tree.line(run, 0.4, POOL)
