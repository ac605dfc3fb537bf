"""The trace counted in blocks: which blocks of which network were computed, and which decision spared the rest.

Every block of every evaluation of a network counts one. A decision about the whole network covers all its
blocks, one about a range of blocks is finer and wins, and a block that no decision covers was computed: nothing
is ever claimed to be skipped without a recorded decision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from hasten.trace import Action, Event, Trace


@dataclass(frozen=True, slots=True)
class Band:
    """Neighbouring blocks [start, stop) of one site that were treated alike in one evaluation.

    share: part of the batch that the action covers; the rest was skipped (see `Event.share`).
    event: the decision that covers them, None where blocks were computed without one.
    """

    run: int
    step: int
    branch: int
    site: str
    start: int
    stop: int
    action: Action
    share: float
    event: Event | None

    @property
    def num(self) -> int:
        return self.stop - self.start

    def work(self, action: Action) -> float:
        """Blocks treated with `action`; fractional where it covers only a part of the batch."""
        covered = self.share if action == self.action else 0.0
        return self.num * (covered + (1.0 - self.share if action == "skip" else 0.0))


def network_of(site: str) -> str:
    """The network a site belongs to: `transformer` of `transformer.blocks`."""
    return site.partition(".")[0]


def bands_of(trace: Trace, run: int) -> Iterator[Band]:
    """The work of run number `run`, in order of step, branch, network, site, block."""
    events = sorted(trace.of_run(run), key=lambda e: (e.step, e.branch, network_of(e.site)))
    sizes = _sizes(trace.structure, events)
    for (step, branch, network), group in groupby(events, lambda e: (e.step, e.branch, network_of(e.site))):
        decisions = list(group)
        batch = max(event.share for event in decisions)
        for site, num in sizes[network].items():
            cover: list[Event | None] = [None] * num
            # A decision about blocks is finer, and later, than one about the network around them.
            for event in sorted(decisions, key=lambda e: (e.blocks is not None, e.site == site)):
                if event.site == site or (event.blocks is None and event.site == network):
                    start, stop = event.blocks or (0, num)
                    cover[start:stop] = [event] * len(cover[start:stop])
            start = 0
            for _, same in groupby(cover, key=id):
                covering = list(same)
                decision, stop = covering[0], start + len(covering)
                action: Action = decision.action if decision else "compute"
                share = decision.share if decision else batch
                yield Band(run, step, branch, site, start, stop, action, share, decision)
                start = stop


def _sizes(structure: Mapping[str, int], events: list[Event]) -> dict[str, dict[str, int]]:
    """network -> site -> blocks, from the structure; sites it lacks are sized by the blocks seen in events."""
    sizes: dict[str, dict[str, int]] = {}
    for event in events:
        known = sizes.setdefault(network_of(event.site), {})
        if event.blocks is not None:
            known[event.site] = max(known.get(event.site, 1), event.blocks[1])
    for network, known in sizes.items():
        known.update({s: num for s, num in structure.items() if network_of(s) == network and s != network})
        if not known:
            known[network] = structure.get(network, 1)
    return sizes
