"""Which tokens of a prompt the model reads at all: a pass before the prompt's own.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.caching.decode.amount import Amount, Share, top
from hasten.caching.decode.mass import mass
from hasten.part import Part


class PromptChoice(Part):
    """Family of the choices. `at` says after which layer's queries it is made."""

    def start(self) -> PromptChoice:
        """Remembers nothing: this one itself."""
        return self

    def at(self, layers: int) -> int:
        """Number of the layer that decides; what comes after it is not computed in the first pass."""
        raise NotImplementedError(f"{type(self).__name__} has no at().")

    def choose(self, q: Tensor, k: Tensor, at: Tensor, place: Tensor, lengths: list[int], scale: float) -> Tensor:
        """Tokens that are read: bool [B, n], from the layer's q [B, Hq, n, D] and k [B, Hk, n, D] of the prompt; at, place
        int [B, n]: places, negative for padding. lengths: tokens of each row."""
        raise NotImplementedError(f"{type(self).__name__} has no choose().")


class GemFilter(PromptChoice):
    """The tokens that the last query of an early layer attends to, over all heads, smoothed; the whole model then reads
    these alone, with positions that follow each other (GemFilter, 2409.17422).

    depth: the layer that decides, as a share of all layers (the paper: 13 of 32). The last token is always read. Of a
    batch each row chooses for itself. Where a prompt has no more tokens than `amount`, it is read as it is.
    """

    kind: ClassVar[str] = "gem-filter"
    depth: float = Field(0.4, ge=0, lt=1)
    amount: Amount = Share(share=0.5)
    smooth: int = Field(5, ge=1)

    def at(self, layers: int) -> int:
        return min(layers - 1, math.floor(self.depth * layers))

    def choose(self, q: Tensor, k: Tensor, at: Tensor, place: Tensor, lengths: list[int], scale: float) -> Tensor:
        got = mass(q[:, :, -1:], k, at[:, -1:], place[:, None], scale).sum(1)
        padded = torch.nn.functional.pad(got[:, None], (self.smooth // 2, (self.smooth - 1) // 2))
        worth = torch.nn.functional.avg_pool1d(padded, self.smooth, stride=1)[:, 0]
        worth[:, -1] = math.inf
        worth = worth.masked_fill(place < 0, -math.inf)
        goals = torch.tensor([min(length, self.amount.of(length, None)) for length in lengths], device=q.device)
        return top(worth, goals) & (place >= 0)
