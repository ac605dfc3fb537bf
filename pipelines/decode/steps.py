"""Rounds without drafts, several in one go: token by token, as transformers' own loop writes, and the drafter is told when they
are over. A step waits for the device once, for its tokens.

Shapes: B rows, k steps, V tokens.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.pipelines.decode.laws import Scores
from hasten.rounds import Round
from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Outcome, Verdict

if TYPE_CHECKING:
    from hasten.pipelines.decode.loop import Loop
    from hasten.pipelines.decode.walk import Walk


MOST_NUMBERS = 1 << 24
"""Logits that are kept for the drafter until the steps are over; 64 MiB."""


class Steps:
    """At most `most` steps of a loop, fewer where all rows end. `run` leaves it as that many rounds without drafts would.

    read: tokens int64 [B] that were read, step by step, and last those that are to be read next. raw, scores: logits [B, V] of
    each step, and these behind the processors. took: tokens that each row wrote; wrote: those of each step's active rows.
    """

    def __init__(self, loop: Loop, walk: Walk, most: int) -> None:
        self.loop, self.walk, self.most = loop, walk, most
        self.active = loop.context.active
        level = None if loop.processors.kind == "alone" else loop.rows.level
        self.prefix = None if level is None else loop.rows.columns(level)
        self.read = [loop.context.last]
        self.raw: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.hidden: list[dict[str, Tensor]] = []
        self.tokens: list[list[int]] = []
        self.took = [0] * len(self.active)
        self.wrote: list[tuple[int, ...]] = []

    def run(self, asked: int = 0, draft: float = 0.0) -> list[Round]:
        """The rounds, for the account. asked: drafts that the drafter was asked for, in `draft` seconds, and knew none."""
        clock = [time.perf_counter()]
        with self.loop.drafter.reading(nothing(self.read[0])):
            while len(self.raw) < self.most and any(self.active):
                self._step()
                clock.append(time.perf_counter())
        self._tell()
        share = (time.perf_counter() - clock[-1]) / len(self.raw)
        return [
            Round(asked, 0, (0,) * len(wrote), wrote, draft=draft, verify=end - begin, commit=share)
            for wrote, begin, end in zip(self.wrote, clock, clock[1:], strict=False)
        ]

    def _step(self) -> None:
        """Write one token of each row."""
        loop, last = self.loop, self.read[-1]
        logits, hidden = loop.read(input_ids=last[:, None], **self.walk.inputs())
        raw = logits[:, -1]
        scores = loop.processors.first(last[:, None] if self.prefix is None else self.prefix, raw)
        token = loop.verifier.alone(last, Scores(loop.processors.sampled, scores[:, None]))
        tokens = token.tolist()
        self.wrote.append(tuple(self._write(row, tokens, raw, scores) for row, active in enumerate(self.active) if active))
        self.read.append(token)
        self.raw.append(raw)
        self.scores.append(scores)
        self.hidden.append(hidden)
        self.tokens.append(tokens)
        if self.prefix is not None:
            shown = [new if active else loop.rows.pad or 0 for new, active in zip(tokens, self.active, strict=True)]
            self.prefix = torch.cat([self.prefix, self.prefix.new_tensor(shown)[:, None]], 1)
        loop.rows.stream()
        self.active = loop.rows.active

    def _write(self, row: int, tokens: list[int], raw: Tensor, scores: Tensor) -> int:
        if any(self.loop.keeps):
            self.loop.keep(row, raw[row : row + 1], scores[row : row + 1])
        written = self.loop.rows.write(row, tokens[row : row + 1])
        self.took[row] += written
        return written

    def _tell(self) -> None:
        """Commit. For the drafter the steps are a chain that stood, without its last token."""
        loop, count = self.loop, len(self.raw)
        index = torch.arange(count, device=self.read[0].device)
        tokens = torch.stack(self.read[:-1], 1)
        proposal = Proposal(tokens, (index - 1).expand_as(tokens), torch.ones_like(tokens, dtype=torch.bool))
        verdict = Verdict(index.expand_as(tokens), torch.full_like(self.read[0], count - 1), self.read[-1])
        if not loop.processors.sampled:
            loop.session.lead(torch.stack(self.scores, 1), self.took)
        loop.tail.commit(verdict.path, torch.tensor(self.took), loop.longest(), straight=True)
        rows = [[step[row] for step in self.tokens[:took]] + [-1] * (count - took) for row, took in enumerate(self.took)]
        hidden = {name: torch.cat([each[name] for each in self.hidden], 1) for name in self.hidden[0]}
        loop.tell(Outcome(proposal, verdict, tokens.new_tensor(rows), self.took, torch.stack(self.raw, 1), hidden))
