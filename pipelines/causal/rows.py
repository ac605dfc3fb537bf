"""What attention of a language model did, counted while it runs, without waiting for the device.

Shapes: B batch, Hq heads, n new queries, Dv head dimension of the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.trace import Reading


@dataclass(frozen=True, slots=True)
class Done:
    """One sparse call. o: [B, Hq, n, Dv]. read: pairs of a query and a key, over all samples and heads, that were
    computed (a tensor that nobody has waited for; with those that a mask forbids within a block). recall: mean share of
    the softmax mass that was read, estimated or measured (as read); None where nobody knows."""

    o: Tensor
    read: Tensor | float
    recall: Tensor | None = None


@dataclass(slots=True)
class Row:
    """What happened at one layer in one phase ("prompt" or "cache"). sparse, dense: calls. read, all, rest: as in
    `hasten.trace.Reading`; read is a tensor once there was a sparse call. keys: most that a call had."""

    site: str
    layer: int
    phase: str
    sparse: int = 0
    dense: int = 0
    read: Tensor | float = 0.0
    all: float = 0.0
    rest: float = 0.0
    keys: int = 0
    _known: int = 0
    _recall: Tensor | None = None
    _lowest: Tensor | None = None

    def add(self, done: Done | None, pairs: float, keys: int) -> None:
        """Count one call; None: it was dense. pairs: those that the model's own attention computes."""
        self.keys = max(self.keys, keys)
        if done is None:
            self.dense, self.rest = self.dense + 1, self.rest + pairs
            return
        self.sparse, self.read, self.all = self.sparse + 1, self.read + done.read, self.all + pairs
        if done.recall is not None:
            self._known += 1
            self._recall = done.recall if self._recall is None else self._recall + done.recall
            self._lowest = done.recall if self._lowest is None else torch.minimum(self._lowest, done.recall)

    @property
    def density(self) -> float:
        """Share of the model's pairs that sparse calls computed; 1 where there were none. Waits for the device."""
        return min(1.0, float(self.read) / self.all) if self.all else 1.0

    def reading(self) -> Reading:
        """The same as numbers. Waits for the device."""
        recall = None if self._recall is None else float(self._recall) / self._known
        lowest = None if self._lowest is None else float(self._lowest)
        return Reading(
            self.site, self.layer, self.phase, self.sparse, self.dense, float(self.read), self.all, self.rest, recall, lowest
        )
