"""Scorers: how much attention mass a pair of blocks is worth, before any of it is computed.

Shapes: see `hasten.sparse_attn.blocks`. A score is the logarithm of the mass that a query block is expected to give to
a key block, up to a constant per query block: `softmax(scores, -1)` is the estimated share. -inf: never read. +inf:
always read, and no part of the shares.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.part import Part
from hasten.sparse_attn.blocks import NEVER, Blocks, Order, block_mean, grouped
from hasten.sparse_attn.extent import FORBIDDEN, block_states
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.segments import Tokens


@dataclass(frozen=True, slots=True)
class View:
    """What a scorer sees. q [B, Hq, Sq, D] and k [B, Hk, Sk, D] are arranged; scale multiplies q.k; see `Blocks`.

    v: [B, Hk, Sk, Dv] arranged, where the caller has it; only routing by error looks at values.
    """

    q: Tensor
    k: Tensor
    blocks: Blocks
    q_tokens: Tokens
    k_tokens: Tokens
    scale: float
    mask: Mask | None = None
    v: Tensor | None = None

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
    """State of a scorer without memory; those with one override `observe` and say so in `needs_lse`.

    needs_values: whether `View.v` is looked at.
    """

    needs_lse: bool = False
    needs_values: bool = False

    def scores(self, view: View) -> Tensor:
        """float32 [1 or B * Hq, Cq, Ck]."""
        raise NotImplementedError

    def observe(self, view: View, lse: Tensor) -> None:
        """Attention was computed densely: its LSE [B, Hq, Sq], arranged."""


def readable(scores: Tensor, view: View) -> Tensor:
    """`scores` with -inf for key blocks that cannot be read: without tokens, padding, forbidden by the mask."""
    there = (grouped(view.blocks.k.sizes, view.groups) > 0) & (view.blocks.k.roles != NEVER)
    found = scores.masked_fill(~there[:, None, :], -math.inf)
    if view.mask is None:
        return found
    return found.masked_fill(block_states(view.blocks, view.mask, view.groups) == FORBIDDEN, -math.inf)


def logarithm(mass: Tensor) -> Tensor:
    """log of an estimated mass. One too small for a float32 is very little, but not -inf: it may be read all the same."""
    return mass.clamp(min=1e-37).log()


def means(x: Tensor, order: Order) -> Tensor:
    """Mean of arranged x [B, H, S, D] over each block: float32 [B * H, C, D]; the layout's own where it has them."""
    if order.means is None:
        return block_mean(x, order)
    return order.means.expand(x.shape[0] * x.shape[1], -1, -1)


def products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q.k for q [Pq, M, D] and k [Pk, N, D] in float32: [Pq, M, N]; heads of a group share their keys."""
    planes, rows, width = q.shape
    stacked = q.float().reshape(k.shape[0], planes // k.shape[0] * rows, width)
    return torch.bmm(stacked, k.float().mT).mul_(scale).view(planes, rows, k.shape[1])
