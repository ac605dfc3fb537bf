"""One pass through all block lists of a network at one step: compute and learn, or leave out and stand in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hasten.caching.spans import Piece
from hasten.caching.stack import StackState
from hasten.caching.stack_signals import Evidence
from hasten.pipelines.seams.stack_shadow import Outs, piece_of
from hasten.pipelines.seams.structure import BlockCall, Stack
from hasten.pipelines.seams.token_rows import TokenRows
from hasten.step import Step

Record = Callable[[str, tuple[int, int], str, bool, float], None]
"""(list name, blocks, action, is it the decision, share of the tokens) -> None; how a walk reports what it did."""


class Walk:
    """Hands the blocks of one pass to the decisions of a `StackState`.

    outs: where a `Shadow` will learn the pieces, the streams that it has to know; None where this walk learns them itself.
    Legend, per piece and stream: path, the value that would come out if every block of the piece were the identity,
    which is the piece's input plus all that the network adds between its blocks.
    """

    def __init__(
        self, stacks: list[Stack], step: Step, state: StackState, record: Record, outs: Outs | None = None
    ) -> None:
        self.outs = outs
        self.step, self.state, self.record = step, state, record
        self.stacks = stacks
        self.sites = {stack.name: (site, stack) for site, stack in enumerate(stacks)}
        self.pieces: tuple[Piece, ...] = ()
        self.skipping = False
        self.start: list[Tensor] = []
        self.others: list[Tensor] = []
        self.before: dict[int, list[Tensor]] = {}
        self.versions: dict[int, list[int]] = {}
        self.paths: dict[Piece, list[Tensor]] = {}
        self.left_out: dict[int, Piece] = {}
        self.rows: dict[Piece, TokenRows] = {}
        self.done: dict[int, list[tuple[int, int, str, float]]] = {}
        self._told = False

    def block(self, name: str, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.sites or index >= self.sites[name][1].num:
            return block(*args, **kwargs)
        site, stack = self.sites[name]
        call = BlockCall(index, args, kwargs, None)
        now = stack.inputs(args, kwargs)
        if site == 0 and index == 0:
            self._see(stack, call, now)
        if site == 0 and index == self.state.policy.lead:
            self._decide(now)
        added = self._added(site, now)
        self._enter(site, index, now)
        apart = {owner: rows for owner, rows in self.rows.items() if owner.site == site}
        for owner, rows in apart.items():
            rows.run(stack, block, call, added[0] if index > owner.start else None)
        piece = self.left_out.get(site)
        if piece is None:
            out = block(*args, **kwargs)
            # Chosen tokens have run beside all the others and among themselves, and that is counted, too.
            self._leave(site, stack, index, stack.outputs(out), 1.0 + sum(rows.share for rows in apart.values()))
            return out
        return self._stand_in(stack, piece, call, now)

    # --- decide -----------------------------------------------------------------------------------

    def _see(self, stack: Stack, call: BlockCall, now: list[Tensor]) -> None:
        """Remember what block 0 is called with."""
        self.start = now
        streams = {id(stream) for stream in now}
        self.others = [t for t in call.tensors().values() if t.is_floating_point() and id(t) not in streams]

    def _decide(self, now: list[Tensor]) -> None:
        # What leading blocks returned, before anything is injected behind them.
        lead = [b - s for b, s in zip(self.before[0], self.start, strict=True)] if 0 in self.before else []
        self.skipping = self.state.decide(self.step, Evidence(now, lead, self.start[0], self.others))
        self.pieces = self.state.pieces(self.step) if self.skipping else self.state.wanted(self.step)

    # --- follow -----------------------------------------------------------------------------------

    def _added(self, site: int, now: list[Tensor]) -> list[Tensor | None]:
        """What the network added to each stream since the last block; taken into the paths of all open pieces."""
        before = self.before.get(site)
        if before is None or self.outs is not None:
            return [None] * len(now)
        if self.versions[site] != [b._version for b in before if not b.is_inference()]:
            self._changed_in_place(site)
            return [None] * len(now)
        added = [None if n is b else n - b for n, b in zip(now, before, strict=True)]
        for piece, path in self.paths.items():
            if piece.site == site:
                self.paths[piece] = [p if a is None else p + a for p, a in zip(path, added, strict=True)]
        return added

    def _changed_in_place(self, site: int) -> None:
        """The network added to what a block has returned, in that tensor (a ControlNet that was switched on): what it
        added is lost, so nothing is learned from this list now; from the next pass on its streams are copied."""
        self.stacks[site] = dataclasses.replace(self.stacks[site], in_place=True)
        for piece in [piece for piece in self.paths if piece.site == site]:
            del self.paths[piece]
            self.rows.pop(piece, None)

    def _keep(self, site: int, stack: Stack, out: list[Tensor]) -> None:
        """Remember what the next block is called with, but for what the network adds."""
        copied = stack.in_place or any(stream.is_inference() for stream in out)
        self.before[site] = [stream.clone() for stream in out] if copied else out
        self.versions[site] = [stream._version for stream in self.before[site] if not stream.is_inference()]

    def _enter(self, site: int, index: int, now: list[Tensor]) -> None:
        """Pieces that begin here are left out, or followed in order to be learned."""
        for piece in self.pieces:
            if (piece.site, piece.start) != (site, index):
                continue
            if self.skipping and self.state.fits(self.step, piece, now):
                self.left_out[site] = piece
                chosen = self.state.chosen(self.step, piece, now[0])
                if chosen is not None:
                    self.rows[piece] = TokenRows(chosen.index, now[0], chosen.lack)
            else:
                self.paths[piece] = now
                picked = self.state.choose(self.step, piece, now[0])
                if picked is not None:
                    self.rows[piece] = TokenRows(picked, now[0])

    def _leave(self, site: int, stack: Stack, index: int, out: list[Tensor], share: float) -> None:
        """A block was computed, on `share` of the tokens; pieces that end with it are learned."""
        self._keep(site, stack, out)
        if self.outs is not None:
            piece = piece_of(self.pieces, site, index)
            if piece is None or index == piece.stop - 1:
                self.outs[site, index] = [stream.clone() for stream in out]  # what follows may change them in place
            self.paths.clear()
        for piece in [p for p in self.paths if (p.site, p.stop) == (site, index + 1)]:
            residuals = [o - p for o, p in zip(out, self.paths.pop(piece), strict=True)]
            rows = self.rows.pop(piece, None)
            chosen = None if rows is None else rows.lack(out[0])
            self.state.observe(self.step, piece, residuals, chosen)
        self._note(site, stack, index, "compute", share)

    # --- stand in ---------------------------------------------------------------------------------

    def _stand_in(self, stack: Stack, piece: Piece, call: BlockCall, now: list[Tensor]) -> Any:
        """The block lets its streams through; the last one of the piece adds what the piece would have added."""
        site, rows, out = piece.site, self.rows.get(piece), now
        if call.index == piece.stop - 1:
            out = [n + r for n, r in zip(now, self.state.estimate(self.step, piece), strict=True)]
            if rows is not None:
                out = [rows.put_into(out[0])]
                del self.rows[piece]
            del self.left_out[site]
        self._keep(site, stack, out)
        self._note(site, stack, call.index, "stand_in" if rows is None else "compute", 1.0 if rows is None else rows.share)
        return stack.pack(out)

    def _note(self, site: int, stack: Stack, index: int, action: str, share: float) -> None:
        """Neighbouring blocks that were treated alike are one event, recorded when the list is through."""
        done = self.done.setdefault(site, [])
        if done and done[-1][1:] == (index, action, share):
            done[-1] = (done[-1][0], index + 1, action, share)
        else:
            done.append((index, index + 1, action, share))
        if index < stack.num - 1:
            return
        for start, stop, what, part in self.done.pop(site):
            # The decision's signal stands on the first thing that it led to.
            deciding = not self._told and (not self.skipping or what == "stand_in" or part < 1.0)
            self._told = self._told or deciding
            self.record(stack.name, (start, stop), what, deciding, part)
