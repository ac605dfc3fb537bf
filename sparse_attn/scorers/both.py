"""Two scorers in one."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from hasten.sparse_attn.scorers.scorer import Scorer, ScorerState, View


class Both(Scorer):
    """Scores of two scorers, joined.

    how: "max", the larger; "sum", the sum of both masses; "union", what `first` would read is read always and
    `second` chooses among the rest (a window or a sink beside a choice: NABLA, Sol-Attn's neighbours); "within",
    `second` chooses among what `first` would read.
    """

    kind = "both"
    first: Scorer
    second: Scorer
    how: Literal["max", "sum", "union", "within"] = "max"

    def start(self) -> ScorerState:
        return _Both(self)


class _Both(ScorerState):
    def __init__(self, part: Both) -> None:
        self.how, self.first, self.second = part.how, part.first.start(), part.second.start()
        self.needs_lse = self.first.needs_lse or self.second.needs_lse
        self.needs_values = self.first.needs_values or self.second.needs_values

    def observe(self, view: View, lse: Tensor) -> None:
        for state in (self.first, self.second):
            if state.needs_lse:
                state.observe(view, lse)

    def scores(self, view: View) -> Tensor:
        first, second = self.first.scores(view), self.second.scores(view)
        if self.how == "max":
            return torch.maximum(first, second)
        if self.how == "sum":
            return torch.logaddexp(first, second)
        reads = first > -math.inf
        if self.how == "union":
            return torch.where(reads, math.inf, second)
        return torch.where(reads, second, -math.inf)
