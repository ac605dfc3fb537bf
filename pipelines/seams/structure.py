"""Structure discovery: which of a block's outputs are the next block's inputs, found by watching one forward."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Slot = int | str
"""Where a block takes a stream: a position or a keyword."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of blocks that the network runs in order.

    name: attribute of the network. num: blocks that can be left out, counted from the first; a last block that drops
    a stream (SD3's) is not one of them, nor is what comes behind the place where the chain starts again with another
    stream (the decoder's blocks of Motif-Video). slots: per stream, where a block takes it; outs: per
    stream, its index in the block's return value (None: the return value is the stream itself).
    Streams are ordered by size, largest first. arity: length of the returned tuple.
    injected: how many times something was added between two blocks. in_place: something is added to what a block
    has returned, in that very tensor (Chroma's ControlNet), so that it has to be copied in order to be known.
    turns: its blocks take turns with those of another list.
    """

    name: str
    num: int
    slots: tuple[Slot, ...]
    outs: tuple[int | None, ...]
    arity: int
    injected: int
    in_place: bool = False
    turns: bool = False

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The streams a block was called with."""
        return [args[slot] if isinstance(slot, int) else kwargs[slot] for slot in self.slots]

    def outputs(self, value: Any) -> list[Tensor]:
        """The streams a block returned."""
        return [value if out is None else value[out] for out in self.outs]

    def pack(self, streams: list[Tensor]) -> Any:
        """A block's return value made of `streams`."""
        if self.outs == (None,):
            return streams[0]
        values: list[Tensor | None] = [None] * self.arity
        for out, stream in zip(self.outs, streams, strict=True):
            assert out is not None
            values[out] = stream
        return tuple(values)


@dataclass(slots=True)
class BlockCall:
    """One observed call of a block."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def output(self, index: int) -> Any:
        return self.out[index] if isinstance(self.out, tuple | list) else self.out

    def takes(self, before: BlockCall) -> bool:
        """Is one of its arguments the very tensor that `before` returned?"""
        returned = before.out if isinstance(before.out, tuple | list) else [before.out]
        return any(tensor is value for tensor in self.tensors().values() for value in returned)

    def tensors(self) -> dict[Slot, Tensor]:
        """Tensor arguments by slot."""
        found: dict[Slot, Tensor] = {i: value for i, value in enumerate(self.args) if isinstance(value, Tensor)}
        found.update({name: value for name, value in self.kwargs.items() if isinstance(value, Tensor)})
        return found


def candidates(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Attributes of `model` that hold a list of at least two modules."""
    lists = {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList)}
    return {name: list(blocks) for name, blocks in lists.items() if len(blocks) >= 2}


class Watcher:
    """Watches the blocks of one list during one forward, two calls at a time (activations are large)."""

    def __init__(self, name: str, num: int) -> None:
        self.name, self.num = name, num
        self.seen = 0
        self.chain = 0
        self.span = (0, 0)
        self.blind = True
        self.fed = 0
        self.in_place = False
        self.ends: set[int] = set()
        self.versions: dict[int, int | None] = {}
        self.shapes: list[tuple[dict[int, Any], dict[Slot, Any]]] = []
        self.reason = ""
        self.previous: BlockCall | None = None
        self.by_identity: dict[int, Slot] = {}
        self.by_shape: dict[int, Slot] = {}
        self.sizes: dict[int, int] = {}
        self.arity = 0
        self.bare = False
        self.joints: list[dict[int, Slot]] = []

    def observe(self, call: BlockCall, moment: int = 0, *, fed: bool = False) -> None:
        """Take one block call into account.

        moment: its place among the calls of all lists. fed: whether it was given the very output of another list's block.
        """
        self.fed += fed
        self.span = (self.span[0] if self.seen else moment, moment)
        if call.index != self.seen:
            self.reason = self.reason or "its blocks run out of order or more than once"
        self.seen += 1
        if self.previous is None:
            self._first(call)
        elif not self.reason and not self.chain:
            self._joint(self.previous, call)
        self.previous = call
        values = {index: call.output(index) for index in self.sizes}
        self.ends = {index for index, value in values.items() if not isinstance(value, Tensor)}
        self.versions = {index: _version(value) for index, value in values.items() if isinstance(value, Tensor)}
        if self.seen == 1:  # one host synchronisation per list, in a pass whose latents were all NaN
            self.blind = not any(bool(torch.isnan(v).any()) for v in values.values() if isinstance(v, Tensor))

    def _first(self, call: BlockCall) -> None:
        self.bare = not isinstance(call.out, tuple | list)
        values = [call.out] if self.bare else list(call.out)
        self.arity = len(values)
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                self.sizes[index] = value.numel()
            elif value is not None:
                self.reason = f"its blocks return a {type(value).__name__} that cannot be made up on a skipped step"
        if not self.sizes and not self.reason:
            self.reason = "its blocks return no tensor"

    def _joint(self, before: BlockCall, now: BlockCall) -> None:
        """Learn from the seam between two blocks."""
        if self.ends:
            self.reason = "one of its blocks drops a stream"
            return
        given, earlier = now.tensors(), before.tensors()
        if self._starts_again(before, given):
            self.chain = now.index
            return
        self.in_place |= any(_version(before.output(index)) != was for index, was in self.versions.items())
        self.shapes.append(
            ({i: before.output(i).shape for i in self.sizes}, {slot: value.shape for slot, value in given.items()})
        )
        same: dict[int, Slot] = {}
        for index in self.sizes:
            value = before.output(index)
            for slot, tensor in given.items():
                if tensor is value:
                    same[index] = slot
            moved = [s for s, t in given.items() if t.shape == value.shape and s in earlier and earlier[s] is not t]
            if len(moved) == 1:
                self.by_shape.setdefault(index, moved[0])
            if all(t.shape != value.shape for t in earlier.values()):
                self.reason = "its blocks change the shape of what they pass on"
        self.by_identity.update(same)
        self.joints.append(same)

    def _starts_again(self, before: BlockCall, given: dict[Slot, Tensor]) -> bool:
        """Is a stream no longer where the blocks so far have taken it, but elsewhere or nowhere?"""
        for index, slot in self.by_identity.items():
            value, taken = before.output(index), given.get(slot)
            elsewhere = any(tensor is value for other, tensor in given.items() if other != slot)
            if taken is None or taken.shape != value.shape or (elsewhere and taken is not value):
                return True
        return False

    def stack(self) -> Stack | str:
        """What was found, or why these blocks cannot be skipped."""
        if self.seen != self.num and not self.reason:
            self.reason = f"{self.seen} of its {self.num} blocks ran"
        slots = {**self.by_shape, **self.by_identity}
        missing = [index for index in self.sizes if index not in slots]
        if not self.reason and (missing or len(set(slots.values())) < len(slots)):
            self.reason = "a block returns something that is not an input of the next one"
        if not self.reason and any(taken.get(slots[i]) != given[i] for given, taken in self.shapes for i in given):
            self.reason = "its chain of blocks starts again with another stream"
        if self.reason:
            return f"{self.name}: {self.reason}"
        order = sorted(self.sizes, key=lambda index: -self.sizes[index])
        injected = sum(len(self.sizes) - len(same) for same in self.joints)
        outs: tuple[int | None, ...] = (None,) if self.bare else tuple(order)
        num = self.chain or self.num - bool(self.ends)
        return Stack(self.name, num, tuple(slots[i] for i in order), outs, self.arity, injected, self.in_place)


def understand(watchers: dict[str, Watcher]) -> dict[str, Stack | str]:
    """What each list of a network is, in the order in which they began: a stack, or why it cannot be skipped.

    The latents of the watched pass were NaN. A list whose blocks do not show it sees the text alone: it is cheap, and
    as the first list it would decide by a signal that never moves. A list that is fed by another one and feeds none
    is an adapter beside the stream: it is always computed, and the other one is a chain without it.
    """
    sighted = not all(watcher.blind for watcher in watchers.values())
    found: dict[str, Stack | str] = {}
    for name, watcher in watchers.items():
        found[name] = watcher.stack()
        others = [o for o in watchers.values() if o is not watcher and not (o.fed and not watcher.fed)]
        around = [o for o in others if _within(watcher.span, o.span)]
        stack = found[name]
        if isinstance(stack, Stack) and len(around) == 1 and _alternate(watcher, around[0]):
            found[name] = dataclasses.replace(stack, turns=True)
        elif around:
            found[name] = f"{name}: its blocks take turns with those of {around[0].name}"
        elif sighted and watcher.blind and isinstance(found[name], Stack):
            found[name] = f"{name}: its blocks do not see the latents"
    return found


def _alternate(one: Watcher, other: Watcher) -> bool:
    """Do two lists hand one stream to and fro?"""
    mutual = _within(one.span, other.span) and _within(other.span, one.span)
    return mutual and one.num == other.num and bool(one.fed) == bool(other.fed)


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    """True when something of `outer` ran both before and behind the start or the end of `inner`."""
    return outer[0] < inner[0] < outer[1] or outer[0] < inner[1] < outer[1]


def _version(value: Tensor) -> int | None:
    """How often `value` was changed in place; inference tensors do not count."""
    return None if value.is_inference() else value._version
