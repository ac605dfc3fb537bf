"""A second pass in which blocks are left out, to learn what the network makes of a stream between its blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hasten.caching.spans import Piece
from hasten.caching.stack import StackState
from hasten.pipelines.seams.structure import Stack
from hasten.step import Step

Outs = dict[tuple[int, int], list[Tensor]]
"""(list, block) -> the streams that the block returned, before the network did anything to them."""


class Shadow:
    """Learns the pieces of a step that was just computed, where the network does more between blocks than add.

    Where something between the blocks depends on the stream (ConsisID's and Wan-Animate's face adapters) or moves it from list
    to list (Latte's turns), what it makes of a stream that no block has changed cannot be told from the computed
    pass. Here it is run again on the same input: blocks outside of the pieces return what they did, the others let
    their streams through, and what is missing at the end of a piece is its residual. A skipped step does the same
    and adds it, so that nothing is lost on identical input.
    """

    def __init__(self, stacks: list[Stack], step: Step, state: StackState, outs: Outs) -> None:
        self.sites = {stack.name: (site, stack) for site, stack in enumerate(stacks)}
        self.step, self.state, self.outs = step, state, outs
        self.pieces = state.wanted(step)

    def block(self, name: str, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.sites or index >= self.sites[name][1].num:
            return block(*args, **kwargs)
        site, stack = self.sites[name]
        piece = piece_of(self.pieces, site, index)
        if piece is not None and index < piece.stop - 1:
            return stack.pack(stack.inputs(args, kwargs))
        out = self.outs[site, index]
        if piece is not None:
            now = stack.inputs(args, kwargs)
            self.state.observe(self.step, piece, [o - n for o, n in zip(out, now, strict=True)])
        return stack.pack(out)


def piece_of(pieces: tuple[Piece, ...], site: int, index: int) -> Piece | None:
    """The one of `pieces`, which do not overlap, in which block `index` of list `site` lies."""
    return next((p for p in pieces if p.site == site and p.start <= index < p.stop), None)
