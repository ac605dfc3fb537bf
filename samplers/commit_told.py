"""Rules that are told from outside which tokens are right: by a guiding model, or by the text itself.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hasten.canvas import Canvas
from hasten.errors import UsageError
from hasten.samplers.commit import CommitRule, CommitState
from hasten.samplers.scores import Scores, best


class Agreed(CommitRule):
    """Slots whose token a small causal model would write, too (Guided Diffusion of FlashDLM, arXiv 2505.21467).

    The guide reads the text with every proposed token in its place, once per step; where its most probable next token
    is the one proposed, the slot is written. It never writes by itself. Where they agree on nothing, the surest slot
    is written. The paper's guide sees the proposals of the whole text; here those of the active block, behind which
    nothing can be written.
    """

    kind: ClassVar[str] = "agreed"
    guided: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def start(self) -> CommitState:
        return _AgreedState()


class _AgreedState(CommitState):
    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        return scores.among(canvas) & (scores.guide == scores.token)


class Oracle(CommitRule):
    """Slots whose token is that of `final` already: the limit that no rule can beat, for benchmarks.

    final: what each text of the batch is to become, behind its prompt. Where no open slot agrees, the surest gets its
    final token, so that the result is `final` in any case.
    """

    kind: ClassVar[str] = "oracle"
    remembers: ClassVar[bool] = True  # it counts the texts of the batch; drafts are more of them
    final: tuple[tuple[int, ...], ...]

    def start(self) -> CommitState:
        return _OracleState(self)


class _OracleState(CommitState):
    def __init__(self, rule: Oracle) -> None:
        self.rule = rule
        self.final: Tensor | None = None

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        if self.final is None:
            self.final = _behind_prompts(self.rule.final, canvas)
        known = scores.among(canvas) & (self.final >= 0)
        right = known & (scores.token == self.final)
        forced = best(scores.rank, known, (~right.any(1)).long())
        scores.token = torch.where(forced, self.final, scores.token)
        return right | forced


def _behind_prompts(final: tuple[tuple[int, ...], ...], canvas: Canvas) -> Tensor:
    """The tokens of each text in their slots, int64 [B, L]; -1 elsewhere."""
    if len(final) != len(canvas.ids):
        raise UsageError(f"The oracle knows {len(final)} texts and is asked for {len(canvas.ids)}. Give one each.")
    longest = max(len(text) for text in final)
    padded = [[*text, *[-1] * (longest + 1 - len(text))] for text in final]
    table = torch.tensor(padded, dtype=torch.int64, device=canvas.ids.device)
    behind = canvas.place - canvas.start[:, None]
    return torch.where(behind >= 0, table.gather(1, behind.clamp(0, longest)), -1)
