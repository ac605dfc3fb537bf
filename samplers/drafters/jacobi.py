"""Jacobi decoding: a window of guesses that the model corrects all at once, round after round, up to its fixed point."""

from __future__ import annotations

from collections import deque
from typing import ClassVar

from pydantic import Field

from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome
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


class _JacobiState(HostState):
    sources = ("jacobi", "jacobi-pool")

    def __init__(self, drafter: Jacobi, rows: int) -> None:
        self.drafter = drafter
        self.guesses: list[list[int]] = [[] for _ in range(rows)]
        self.runs: dict[int, deque[tuple[int, ...]]] = {}

    def observe(self, outcome: Outcome, context: Context) -> None:
        """Waits for the device: the model's best tokens behind the window."""
        proposal = outcome.proposal
        best = outcome.logits.argmax(-1).tolist()
        parents, here = proposal.parent.tolist(), self._window(outcome)
        for row, (text, length) in enumerate(zip(context.texts, outcome.lengths, strict=True)):
            line, at = [0], 0
            for node in range(1, len(parents[row])):
                if here[row][node] and parents[row][node] == at:
                    at = node
                    line.append(node)
            said = [best[row][node] for node in line]  # said[i]: of the token that is i + 1 behind the old last one
            self.guesses[row] = said[length:]
            self._remember(text[-length - 1 :] + self.guesses[row])

    def _window(self, outcome: Outcome) -> list[list[bool]]:
        proposal = outcome.proposal
        if proposal.source is None or "jacobi" not in proposal.sources:
            return _nowhere(proposal.tokens.shape)
        mine = proposal.source == proposal.sources.index("jacobi")
        found: list[list[bool]] = (proposal.verified & mine).tolist()
        return found

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


def _nowhere(shape: tuple[int, ...]) -> list[list[bool]]:
    """Nothing at all, [B][N]."""
    return [[False] * shape[1] for _ in range(shape[0])]
