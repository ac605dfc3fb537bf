"""Recovery: what dense steps have shown corrects the sparse steps between them.

Shapes: B batch, H heads, S queries, Dv head dimension.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.part import Part
from hasten.sparse_attn.plan import Output
from hasten.step import Step


class Recover(Part):
    """Base of the recoveries. `start()` gives the state of one run, branch and attention site."""

    @abstractmethod
    def start(self) -> RecoverState:
        """Fresh state."""


class RecoverState:
    """Sees both kinds of output at dense steps, and corrects sparse ones."""

    def wants(self, step: Step) -> bool:
        """Is it worth computing the sparse output at this dense step too?"""
        raise NotImplementedError

    def observe(self, full: Output, sparse: Output, step: Step) -> None:
        """Outputs of the same call, dense and sparse."""
        raise NotImplementedError

    def correct(self, sparse: Output, step: Step) -> Tensor:
        """What the host gets at a sparse step: [B, H, S, Dv]."""
        raise NotImplementedError

    def num_bytes(self) -> int:
        """Bytes held for later steps."""
        raise NotImplementedError


class Residual(Recover):
    """Re-ttention: o = r o_sparse + R, with r = Z_sparse / Z_full and R = o_full - r o_sparse of the last dense step.

    Chen et al., "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape", sections 3.2 and 3.3. r is
    a row's share of the softmax denominator that the sparse pattern reads; it is the difference of two log-sum-exps here,
    where the official code materialises all scores. growth: added to r at each step since (their lambda, 0.04), up to 1.
    """

    kind: ClassVar[str] = "residual"
    growth: float = Field(default=0.04, ge=0)

    def start(self) -> RecoverState:
        return _Residual(self.growth)


class _Residual(RecoverState):
    def __init__(self, growth: float) -> None:
        self.growth = growth
        self._seen: dict[int, tuple[int, Tensor, Tensor]] = {}

    def wants(self, step: Step) -> bool:
        return True

    def observe(self, full: Output, sparse: Output, step: Step) -> None:
        ratio = (sparse.lse - full.lse).exp().nan_to_num(0.0).clamp(max=1.0)[..., None]
        residual = full.o.float() - ratio * sparse.o.float()
        self._seen[step.branch] = (step.index, ratio, residual.to(sparse.o.dtype))

    def correct(self, sparse: Output, step: Step) -> Tensor:
        seen = self._seen.get(step.branch)
        if seen is None or seen[1].shape[:-1] != sparse.o.shape[:-1]:
            return sparse.o
        index, ratio, residual = seen
        share = (ratio + self.growth * (step.index - index)).clamp(max=1.0)
        return torch.addcmul(residual, share.to(sparse.o.dtype), sparse.o)

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, *held in self._seen.values() for t in held)
