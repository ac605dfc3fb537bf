"""Random numbers of a training: functions of seed, step, purpose and row, of nothing else.

A resumed run draws what it would have drawn; two processes with half of a batch each draw what one would have; a row
does not depend on its neighbours.

Shapes: B rows of this process's share of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_Number = Callable[[torch.Generator], Tensor]


class Draw:
    """The random numbers of one step. rows: numbers of its rows in the whole batch, over all processes."""

    def __init__(self, seed: int, step: int, rows: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed, self.step, self.rows, self.device = seed, step, tuple(rows), torch.device(device)

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal, of the shape and dtype of `like` [B, ...]."""
        drawn = [torch.randn(like.shape[1:], generator=g) for g in self._generators(purpose)]
        return torch.stack(drawn).to(like.device, like.dtype)

    def uniform(self, purpose: str) -> Tensor:
        """In [0, 1), float64 [B]."""
        return self._each(purpose, lambda g: torch.rand((), generator=g, dtype=torch.float64))

    def gaussian(self, purpose: str) -> Tensor:
        """Standard normal, a number for each row, float64 [B]."""
        return self._each(purpose, lambda g: torch.randn((), generator=g, dtype=torch.float64))

    def below(self, purpose: str, high: int) -> Tensor:
        """Whole numbers in [0, high), int64 [B]."""
        return self._each(purpose, lambda g: torch.randint(high, (), generator=g))

    def one_below(self, purpose: str, high: int) -> int:
        """One whole number in [0, high), the same for all rows and processes."""
        return int(torch.randint(high, (), generator=self._generator(purpose, -1)))

    def order(self, purpose: str, size: int) -> Tensor:
        """A permutation of `size` rows, int64, the same for all processes."""
        return torch.randperm(size, generator=self._generator(purpose, -1))

    def _each(self, purpose: str, number: _Number) -> Tensor:
        return torch.stack([number(g) for g in self._generators(purpose)]).to(self.device)

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [self._generator(purpose, row) for row in self.rows]

    def _generator(self, purpose: str, row: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{purpose}/{row}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
