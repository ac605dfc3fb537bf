"""Block gates: a plain list of gates shadows a network's block list, so that blocks can be left out.

The registered ModuleList stays where it is: parameters, `state_dict`, hooks and compiled blocks are
untouched, and `forward` meets the gates instead. Outside an active step a gate just calls its block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from hasten.caching.stack import StackState
from hasten.pipelines.structure import BlockCall, Stack, Watcher, candidates
from hasten.session import Attachment
from hasten.step import Step

Record = Callable[[str, tuple[int, int], str, bool], None]
"""(list name, blocks, action, is it a decision) -> None; how the gates report what they did."""


class Gate:
    """Stands in a block list for one block."""

    __slots__ = ("_run", "block", "index")

    def __init__(self, block: nn.Module, index: int, run: Callable[..., Any]) -> None:
        self.block, self.index, self._run = block, index, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.index, self.block, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class GateList(nn.Module):
    """What a network's forward meets in place of its block list: gates by index, the blocks themselves by name.

    A module that shares the list's children, so that code which walks dotted names (peft) finds the blocks.
    """

    def __init__(self, blocks: nn.ModuleList, gates: list[Gate]) -> None:
        super().__init__()
        vars(self)["_modules"] = blocks._modules
        self.gates = gates

    def __iter__(self) -> Iterator[Gate]:
        return iter(self.gates)

    def __len__(self) -> int:
        return len(self.gates)

    def __getitem__(self, index: Any) -> Any:
        return self.gates[index]


class StackGates:
    """All block gates of one network.

    stacks: the lists that can be skipped, in the order in which they run; empty until `learn` has
    watched one forward. refused: list name -> reason.
    """

    def __init__(self, model: nn.Module, lead: int) -> None:
        self.model, self.lead = model, lead
        self.stacks: list[Stack] = []
        self.refused: dict[str, str] = {}
        self._attachment = Attachment()
        self._watchers: dict[str, Watcher] = {}
        self._active = threading.local()

    # --- attach and understand --------------------------------------------------------------------

    def attach(self, names: list[str] | None = None) -> None:
        """Shadow the candidate lists (or only `names`)."""
        for name, blocks in candidates(self.model).items():
            if names is None or name in names:
                gates = [Gate(block, i, self._runner(name)) for i, block in enumerate(blocks)]
                self._attachment.replace(self.model, name, GateList(getattr(self.model, name), gates))

    def detach(self) -> None:
        """Give the network its own lists back."""
        self._attachment.restore()
        self._attachment = Attachment()

    def watch(self, forward: Callable[[], Any]) -> Any:
        """Run `forward` once while recording every block call; then `stacks` and `refused` are known."""
        self._watchers = {}
        self._active.watching = True
        try:
            result = forward()
        finally:
            self._active.watching = False
        found = {name: watcher.stack() for name, watcher in self._watchers.items()}
        self._watchers = {}
        self.stacks = [stack for stack in found.values() if isinstance(stack, Stack)]
        self.refused = {name: reason for name, reason in found.items() if isinstance(reason, str)}
        if not found:
            self.refused["blocks"] = "no list of blocks ran inside this network"
        elif self.stacks and self.stacks[0].num <= self.lead:
            self.refused[self.stacks[0].name] = f"{self.stacks[0].num} blocks, all of them leading"
            self.stacks = []
        return result

    def restrict(self) -> None:
        """Keep gates only where there is something to skip."""
        self.detach()
        self.attach([stack.name for stack in self.stacks])

    # --- one step ---------------------------------------------------------------------------------

    def run(self, forward: Callable[[], Any], step: Step, state: StackState, record: Record) -> Any:
        """Run `forward` with the gates deciding by `state`."""
        self._active.walk = Walk(self, step, state, record)
        try:
            return forward()
        finally:
            self._active.walk = None

    def _runner(self, name: str) -> Callable[..., Any]:
        active = self._active

        def run(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            walk = getattr(active, "walk", None)
            if walk is not None:
                return walk.block(name, index, block, args, kwargs)
            out = block(*args, **kwargs)
            if getattr(active, "watching", False):
                if name not in self._watchers:
                    self._watchers[name] = Watcher(name, len(getattr(self.model, name)))
                self._watchers[name].observe(BlockCall(index, args, kwargs, out))
            return out

        return run


class Walk:
    """One pass through all stacks of a network at one step: compute and learn, or skip and stand in.

    Legend, per stream: entry, where the skippable part began; path, the value that would come out if every
    skippable block were the identity, which is the entry plus all that the network adds between blocks.
    """

    def __init__(self, gates: StackGates, step: Step, state: StackState, record: Record) -> None:
        self.lead, self.step, self.state, self.record = gates.lead, step, state, record
        self.stacks = {stack.name: (site, stack) for site, stack in enumerate(gates.stacks)}
        self.skipping = False
        self.start: list[Tensor] = []
        self.path: list[Tensor] = []
        self.before: list[Tensor] = []

    def block(self, name: str, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.stacks:
            return block(*args, **kwargs)
        site, stack = self.stacks[name]
        lead = self.lead if site == 0 else 0
        now = stack.inputs(args, kwargs)
        if index == 0:
            self.start = now
            if lead == 0:
                self._enter(site, stack, now, decide=site == 0)
        if index < lead:
            out = block(*args, **kwargs)
            if index == lead - 1:
                self._enter(site, stack, stack.outputs(out), decide=True)
            return out
        self._follow(now, first=index == 0)
        if self.skipping:
            return self._stand_in(site, stack, index, now)
        out = block(*args, **kwargs)
        self.before = stack.outputs(out)
        if index == stack.num - 1:
            residuals = [o - p for o, p in zip(self.before, self.path, strict=True)]
            self.state.observe(self.step, site, residuals)
            self.record(stack.name, (0, stack.num), "compute", site == 0)
        return out

    def _enter(self, site: int, stack: Stack, entry: list[Tensor], *, decide: bool) -> None:
        """The skippable part of a stack begins with `entry`."""
        if decide:
            lead = [e - s for e, s in zip(entry, self.start, strict=True)] if self.lead else []
            self.skipping = self.state.decide(self.step, lead, [e.shape for e in entry])
            if not self.skipping:
                self.state.observe_lead(self.step, lead, [e.shape for e in entry])
        self.path = self.before = entry

    def _follow(self, now: list[Tensor], *, first: bool) -> None:
        """Take what was added between the last block and this one into the path."""
        if first:
            return
        self.path = [
            p if n is b else p + (n - b) for p, n, b in zip(self.path, now, self.before, strict=True)
        ]

    def _stand_in(self, site: int, stack: Stack, index: int, now: list[Tensor]) -> Any:
        self.before = now
        if index < stack.num - 1:
            return stack.pack(now)
        lead = self.lead if site == 0 else 0
        if lead:
            self.record(stack.name, (0, lead), "compute", False)
        self.record(stack.name, (lead, stack.num), "stand_in", site == 0)
        return stack.pack([n + r for n, r in zip(now, self.state.estimate(self.step, site), strict=True)])
