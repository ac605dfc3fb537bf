"""Rounds of a decode loop: what was drafted, what of it was accepted, and where the time went. The report reads them, and
the pace that chooses the next."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Round:
    """One forward of the model, behind the prompt.

    asked: drafts that the pace asked for. nodes: those that the model read for a row, node 0 not counted (rows are padded to
    the largest). drafted, written: for each active row, its drafts, and the tokens that it gained: accepted drafts and one
    more. ranks: for each node from 1, in how many rows it was accepted. sources: for each drafter its drafted and its
    accepted nodes. depths: for each depth from 1 its drafted and its accepted nodes. by: for each active row, who guessed each
    of its new tokens: a drafter, "" for the model itself; () where nothing was drafted. ahead: by how many tokens the row that
    has most of its way before it came nearer to its end; 0 where that is not known. draft, verify, commit: seconds of proposing,
    of the model's forward with the verdict, and of writing it down.
    """

    asked: int
    nodes: int
    drafted: tuple[int, ...]
    written: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    sources: tuple[tuple[str, int, int], ...] = ()
    depths: tuple[tuple[int, int], ...] = ()
    by: tuple[tuple[str, ...], ...] = ()
    ahead: int = 0
    draft: float = 0.0
    verify: float = 0.0
    commit: float = 0.0

    @property
    def rows(self) -> int:
        return len(self.written)

    @property
    def seconds(self) -> float:
        return self.draft + self.verify + self.commit
