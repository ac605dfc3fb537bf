"""Vertical and slash lines: which keys, and which distances, do the last queries look at?

Shapes: see `hasten.sparse_attn.blocks`; M probing queries.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from hasten.errors import UsageError
from hasten.sparse_attn.blocks import NEVER, grouped
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.scorers.scorer import Scorer, ScorerState, View, logarithm, readable
from hasten.sparse_attn.sums import key_sums


class LastQueries(Scorer):
    """Attention of the last queries, summed along columns and diagonals, foretells all rows (MInference, section 3.2).

    A block is expected to get what its columns get from the probing queries, or what its diagonals get, whichever is
    more. queries: how many probe (64). columns, diagonals: only as many of the best columns of blocks, and of diagonals
    one block wide, are read at all (their vertical and slash sizes, in blocks; with `All` this is their pattern). Where
    either is None all pairs are candidates, and the selector decides. The paper gathers single columns; here a column
    is a block of keys.

    Tokens have to stand in their order: a layout that permutes them has no diagonals, and is refused.
    """

    kind = "last-queries"
    queries: int = Field(default=64, ge=1)
    columns: int | None = Field(default=None, ge=1)
    diagonals: int | None = Field(default=None, ge=1)

    def start(self) -> ScorerState:
        return _LastQueries(self)


class _LastQueries(ScorerState):
    def __init__(self, part: LastQueries) -> None:
        self.part = part

    def scores(self, view: View) -> Tensor:
        blocks = view.blocks
        if blocks.q.perm is not None or blocks.k.perm is not None:
            raise UsageError("The scorer last-queries looks for diagonals; use it with the layout identity.")
        shares = self._probe(view)
        labels = grouped(blocks.k.labels(), view.groups)
        columns = key_sums(shares, labels, blocks.k.count).mean(1)
        diagonals = self._diagonals(view, shares)
        columns = _best(columns, self.part.columns)[:, None, :]
        if self.part.diagonals is not None:
            diagonals = self._widest(view, diagonals)
        mass = torch.maximum(columns, diagonals)
        chosen = self.part.columns is not None and self.part.diagonals is not None
        return readable(mass.log() if chosen else logarithm(mass), view)

    def _probe(self, view: View) -> Tensor:
        """Shares of the probing queries, which stand one behind the other: float32 [P, M, Sk]."""
        b, heads, _, width = view.q.shape
        end = last_query(view)
        rows = torch.arange(max(0, end - self.part.queries), end, device=view.q.device)
        q = view.q[:, :, rows].float().reshape(b * view.k.shape[1], -1, width)
        k = view.k.flatten(0, 1).float()
        logits = torch.bmm(q, k.mT).mul_(view.scale).view(b * heads, rows.numel(), -1)
        padding = grouped((view.blocks.k.roles == NEVER)[view.blocks.k.labels()], view.groups)
        logits.masked_fill_(padding[:, None, :], -math.inf)
        mask = view.mask or Mask(right=None)
        keys = torch.arange(k.shape[1], device=k.device)
        logits.masked_fill_(~mask.allowed(rows, keys, k.shape[1]), -math.inf)
        return logits.softmax(-1).nan_to_num_(0.0)

    def _diagonals(self, view: View, shares: Tensor) -> Tensor:
        """Expected share by distance: mean share at the distances that a pair of blocks spans, times its keys."""
        planes, total = shares.shape[0], shares.shape[1] + shares.shape[2] - 1
        upto = pad(diagonal_means(shares).double().cumsum(1), (1, 0))
        q, k = view.blocks.q.bounds.long(), grouped(view.blocks.k.bounds, view.groups).long()
        # Diagonal c holds the pairs with key - query = c - latest.
        latest = last_query(view) - 1
        first = (latest - q[:, 1:, None] + 1 + k[:, None, :-1]).clamp(0, total)
        last = (latest - q[:, :-1, None] + k[:, None, 1:] - 1).clamp(-1, total - 1) + 1
        rows, columns = first.shape[1:]
        first, last = (x.expand(planes, -1, -1).flatten(1) for x in (first, last.maximum(first)))
        mass = (upto.gather(1, last) - upto.gather(1, first)) / (last - first).clamp(min=1)
        return mass.float().clamp(min=0).view(planes, rows, columns) * (k[:, 1:] - k[:, :-1])[:, None, :]

    def _widest(self, view: View, diagonals: Tensor) -> Tensor:
        """Only the best diagonals of blocks. A diagonal is the distance between the numbers of two blocks."""
        rows, columns = diagonals.shape[1:]
        number = torch.arange(rows, device=diagonals.device)[:, None] - torch.arange(columns, device=diagonals.device)
        number = (number + columns - 1).expand_as(diagonals).flatten(1)
        found = diagonals.new_zeros(diagonals.shape[0], rows + columns - 1)
        found = found.scatter_reduce(1, number, diagonals.flatten(1), "amax")
        chosen = _best(found, self.part.diagonals) > 0
        return diagonals * chosen.gather(1, number).view_as(diagonals)


def diagonal_means(shares: Tensor) -> Tensor:
    """Means along diagonals: float32 [P, M + N - 1] for [P, M, N]; the last row's first element is alone on the first.

    Row i is moved M - 1 - i places to the right, by reading a padded matrix with a row length that is one less; then
    diagonals are columns.
    """
    planes, rows, columns = shares.shape
    flat = pad(shares.flip(1), (0, rows)).view(planes, -1)[:, : rows * (columns + rows - 1)]
    sums = flat.view(planes, rows, -1).sum(1)
    at = torch.arange(rows + columns - 1, device=shares.device)
    return sums / (at.clamp(max=rows - 1) - (at - columns + 1).clamp(min=0) + 1)


def _best(mass: Tensor, count: int | None) -> Tensor:
    """`mass` [P, N] with all but the `count` largest set to 0."""
    if count is None or count >= mass.shape[1]:
        return mass
    best = mass.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(mass).scatter_(1, best, mass.gather(1, best))


def last_query(view: View) -> int:
    """One behind the last query that is sparse, by position: text and padding at the end of a sequence do not probe."""
    ends = [
        start + segment.length
        for start, segment in zip(view.q_tokens.starts, view.q_tokens.segments, strict=True)
        if segment.queries == "sparse" and segment.length
    ]
    return max(ends, default=view.q_tokens.length)
