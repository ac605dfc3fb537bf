"""Scorers: how much attention mass a pair of blocks is worth, before any of it is computed.

Shapes: see `hasten.sparse_attn.blocks`. A score is the logarithm of the mass that a query block is expected to give to a
key block, up to a constant per query block: `softmax(scores, -1)` is the estimated share. -inf: never read.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from hasten.part import Part
from hasten.sparse_attn.blocks import Blocks
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.segments import Tokens


@dataclass(frozen=True, slots=True)
class View:
    """What a scorer sees. q [B, Hq, Sq, D] and k [B, Hk, Sk, D] are arranged; scale multiplies q.k; see `Blocks`."""

    q: Tensor
    k: Tensor
    blocks: Blocks
    q_tokens: Tokens
    k_tokens: Tokens
    scale: float
    mask: Mask | None = None

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]


class Scorer(Part):
    """Base of the scorers. `start()` gives the state of one run, branch and attention site."""

    @abstractmethod
    def start(self) -> ScorerState:
        """Fresh state."""


class ScorerState:
    """State of a scorer without memory; those with one override `observe` and say so in `needs_lse`."""

    needs_lse: bool = False

    def scores(self, view: View) -> Tensor:
        """float32 [1 or B * Hq, Cq, Ck]."""
        raise NotImplementedError

    def observe(self, view: View, lse: Tensor) -> None:
        """Attention was computed densely: its LSE [B, Hq, Sq], arranged."""
