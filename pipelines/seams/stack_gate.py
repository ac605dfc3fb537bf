"""Block gates: a plain list of gates shadows a network's block list, so that blocks can be left out.

The registered ModuleList stays where it is: parameters, `state_dict`, hooks and compiled blocks are
untouched, and `forward` meets the gates instead. Outside an active step a gate just calls its block.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn

from hasten.pipelines.seams.structure import BlockCall, Stack, Watcher, candidates, understand
from hasten.session import Attachment


class Walker(Protocol):
    """Decides over every block of one pass through the network."""

    def block(self, name: str, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Block `index` of list `name` is called; returns what stands for its output."""


class Gate:
    """Stands in a block list for one block."""

    __slots__ = ("_run", "block", "index")

    def __init__(self, block: nn.Module, index: int, run: Callable[..., Any]) -> None:
        self.block, self.index, self._run = block, index, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.index, self.block, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def rest(self) -> None:
        """From now on only call the block; another session's gates may still stand in front of this one."""
        self._run = lambda index, block, args, kwargs: block(*args, **kwargs)


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

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.ModuleList:
        """A copy of the blocks alone: gates belong to the network they were put on."""
        return nn.ModuleList(copy.deepcopy(block, memo) for block in self.children())


class StackGates:
    """All block gates of one network.

    stacks: the lists that can be skipped, in the order in which they run; empty until `watch` has
    watched one forward. refused: list name -> reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stacks: list[Stack] = []
        self.refused: dict[str, str] = {}
        self._gates: list[Gate] = []
        self._attachment = Attachment()
        self._watchers: dict[str, Watcher] = {}
        self._moments = itertools.count()
        self._latest: tuple[str, BlockCall | None] = ("", None)
        self._active = threading.local()

    # --- attach and understand --------------------------------------------------------------------

    def attach(self, names: list[str] | None = None) -> None:
        """Shadow the candidate lists (or only `names`)."""
        for name in candidates(self.model):
            if names is None or name in names:
                # What stands there now: the blocks, or the gates of another session on this network.
                gates = [Gate(block, i, self._runner(name)) for i, block in enumerate(getattr(self.model, name))]
                self._gates += gates
                self._attachment.replace(self.model, name, GateList(getattr(self.model, name), gates))

    def detach(self) -> None:
        """Give the network its own lists back."""
        self._attachment.restore()
        self._attachment = Attachment()
        for gate in self._gates:
            gate.rest()
        self._gates = []

    def watch(self, forward: Callable[[], Any]) -> Any:
        """Run `forward` once while recording every block call; then `stacks` and `refused` are known."""
        self._watchers, self._moments, self._latest = {}, itertools.count(), ("", None)
        self._active.watching = True
        try:
            result = forward()
        finally:
            self._active.watching = False
        found = understand(self._watchers)
        self._watchers, self._latest = {}, ("", None)
        self.stacks = [stack for stack in found.values() if isinstance(stack, Stack)]
        self.refused = {name: reason for name, reason in found.items() if isinstance(reason, str)}
        if not found:
            self.refused["blocks"] = "no list of blocks ran inside this network"
        return result

    def restrict(self) -> None:
        """Keep gates only where there is something to skip."""
        self.detach()
        self.attach([stack.name for stack in self.stacks])

    @property
    def always(self) -> str:
        """Which blocks of lists that can be skipped are computed at every step, and how much of all blocks; "" for none."""
        ends, weights, total = [], 0, 0
        for name, blocks in candidates(self.model).items():
            num = next((stack.num for stack in self.stacks if stack.name == name), len(blocks))
            sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
            weights, total = weights + sum(sizes[num:]), total + sum(sizes)
            if num < len(blocks):
                ends.append(f"the last {len(blocks) - num} of the {len(blocks)} {name}")
        return f"{' and '.join(ends)}, {weights / max(1, total):.0%} of the weights in its blocks" if ends else ""

    # --- one step ---------------------------------------------------------------------------------

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of blocks of each list."""
        return tuple(stack.num for stack in self.stacks)

    @property
    def turns(self) -> bool:
        """Do the lists take turns, block by block?"""
        return any(stack.turns for stack in self.stacks)

    def run(self, forward: Callable[[], Any], walk: Walker) -> Any:
        """Run `forward`, every block of `stacks` being handed to `walk`."""
        self._active.walk = walk
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
                call, (latest, before) = BlockCall(index, args, kwargs, out), self._latest
                fed = before is not None and latest != name and call.takes(before)
                self._watchers[name].observe(call, next(self._moments), fed=fed)
                self._latest = (name, call)
            return out

        return run
