"""Selectors: which pairs of blocks are read, given their scores."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from hasten.part import Part
from hasten.sparse_attn.blocks import Blocks


class Selector(Part):
    """Base of the selectors. `start()` gives the state of one run, branch and attention site.

    probes: queries per head whose mass is measured for `observe`; 0 where it does not look at that. follows: does it read as
    much as `aim` says, where a run keeps an account of its errors?
    """

    @property
    def probes(self) -> int:
        return 0

    @property
    def follows(self) -> bool:
        return False

    @abstractmethod
    def start(self) -> SelectorState:
        """Fresh state."""


class SelectorState:
    """State of a selector without memory; the closed loop (`TargetRecall`) overrides `observe` too."""

    def keep(self, scores: Tensor, blocks: Blocks) -> Tensor:
        """bool [P, Cq, Ck] for scores float32 [P, Cq, Ck] (P may be 1). Roles are applied afterwards."""
        raise NotImplementedError

    def observe(self, rho: Tensor) -> None:
        """rho: float32 [B * Hq], mean share of the mass that sampled queries of each plane have read exactly."""

    def aim(self, recall: float) -> None:
        """From the next choice on, read this share of the mass; for selectors that follow an account."""
