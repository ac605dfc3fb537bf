"""Does an evaluation write into what it is given? Caches of keys and values are filled during forward."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Hashable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from hasten.pipelines.host import Call

Kind = tuple[Hashable, ...]
"""What the arguments say of how a call treats them, apart from tensors and numbers; () where nothing holds state."""

NUMBERS = (int, float, complex, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.Generator)
CODE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module, numpy.ndarray, numpy.generic)
FLAGS = (bool, str, enum.Enum)
LEAVES = (Tensor, *NUMBERS, *CODE, *FLAGS)
"""What holds nothing else, or nothing that is an argument's own."""

CONTAINERS = (dict, list, tuple, set, frozenset)
DEPTH = 6
"""How deep a cache may lie inside an argument."""


class Writes:
    """Remembers, for one network, which kinds of calls write into their arguments.

    A cache that is filled during forward must be written exactly once per call: an evaluation that writes may be neither
    skipped nor repeated. Which argument is such a cache is not told by its name. It is measured at the first evaluation
    of each kind: a tensor that an argument reaches has changed in place, or it reaches one that it did not reach before.

    Calls are of one kind when their arguments that hold something (objects, and containers with flags) are of the same
    classes and carry the same flags (bool, str, enum), because caches know modes such as "write" and "read".
    """

    def __init__(self) -> None:
        self._written: dict[Kind, str] = {}
        self._measured: set[tuple[Kind, tuple[str, ...]]] = set()

    def knows(self, kind: Kind) -> bool:
        """Has a call of this kind been measured?"""
        return kind in self._written

    def argument(self, kind: Kind) -> str:
        """The argument that calls of this kind write into; "" for none, or when it is not known yet."""
        return self._written.get(kind, "")

    @property
    def refuses(self) -> bool:
        """Has a call been seen that writes into an argument?"""
        return any(self._written.values())

    def watch(self, call: Call, forward: Callable[[], Any]) -> Any:
        """Run `forward`, which evaluates `call`; see what it writes into, where such arguments were not given before."""
        kind = kind_of(call)
        given = (kind, tuple(call.arguments()))
        if given in self._measured:
            return forward()
        before = {name: _Held(value) for name, value in call.arguments().items()}
        result = forward()
        changed = [name for name, value in call.arguments().items() if before[name].differs(value)]
        self._measured.add(given)
        self._written[kind] = self.argument(kind) or (changed[0] if changed else "")
        return result


def kind_of(call: Call) -> Kind:
    """See `Kind`."""
    top: dict[str, Kind] = {}
    held: dict[str, Kind] = {}
    for name, value in call.arguments().items():
        if isinstance(value, FLAGS):
            top[name] = (value,)
        elif not isinstance(value, LEAVES) and (flags := tuple(_flags(value))):
            held[name] = flags
    return tuple(sorted((top | held).items())) if held else ()


def twin(call: Call) -> Call:
    """The same call on arguments of its own, tensors too, for an evaluation that must leave no trace.

    Raises whatever an argument raises that cannot be copied.
    """
    memo: dict[int, Any] = {}
    kwargs = {name: _twin(value, memo) for name, value in call.kwargs.items()}
    return Call(call.layout, tuple(_twin(value, memo) for value in call.args), kwargs)


class _Held:
    """What one argument reached before an evaluation. The tensors are kept, so that their ids are not given away."""

    def __init__(self, value: Any) -> None:
        self.tensors = {id(tensor): tensor for tensor in _tensors(value)}
        self.marks = {key: _mark(tensor) for key, tensor in self.tensors.items()}
        self.entries = _entries(value)

    def differs(self, value: Any) -> bool:
        """Has something been written since? What the call took apart may reach other tensors (Flux pops image embeddings
        off a dict and puts states made of them under another key)."""
        new = self.entries <= _entries(value) and any(id(tensor) not in self.tensors for tensor in _tensors(value))
        return new or any(_mark(tensor) != self.marks[key] for key, tensor in self.tensors.items())


def _entries(value: Any) -> set[Hashable]:
    """Keys of a dict, positions of a list."""
    return set(value) if type(value) is dict else set(range(len(value))) if type(value) is list else set()


def _mark(tensor: Tensor) -> Hashable:
    """Changes when the tensor is written in place. Inference tensors count no versions, so they are read."""
    if not tensor.is_inference():
        return tensor._version
    if not tensor.numel():
        return ()
    wide = tensor.detach().float().flatten()
    return tuple(torch.stack([wide.sum(), wide.abs().sum(), wide[0], wide[-1]]).nan_to_num().tolist())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor that `value` reaches, through containers and objects."""
    return (found for found in _reach(value) if isinstance(found, Tensor))


def _flags(value: Any) -> Iterator[Hashable]:
    """Classes of the objects in `value`, and the bools, strings and enums in them."""
    for found in _reach(value):
        if isinstance(found, FLAGS):
            yield found
        elif not isinstance(found, (*LEAVES, *CONTAINERS)):
            yield f"{type(found).__module__}.{type(found).__qualname__}"


def _reach(value: Any) -> Iterator[Any]:
    """`value` and everything in it, `DEPTH` levels down, in a fixed order."""
    open_ends, seen = [(value, 0)], set()
    while open_ends:
        found, depth = open_ends.pop()
        yield found
        if depth == DEPTH or isinstance(found, LEAVES) or id(found) in seen:
            continue
        seen.add(id(found))
        open_ends += [(inner, depth + 1) for inner in reversed(_inside(found))]


def _inside(value: Any) -> list[Any]:
    """What a container or an object holds directly."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, CONTAINERS):
        return list(value)
    slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name) for name in slots)]


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    return tuple(name for name in ((names,) if isinstance(names, str) else names) if not name.startswith("__"))


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    """A copy to any depth that shares no tensor; one object stays one object."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        made: Any = value.detach().clone()
    elif isinstance(value, LEAVES):
        return value
    elif type(value) in (list, tuple):
        made = type(value)(_twin(inner, memo) for inner in value)
    elif type(value) is dict:
        made = {key: _twin(inner, memo) for key, inner in value.items()}
    else:
        for tensor in _tensors(value):  # deepcopy refuses tensors that gradients have flowed into
            _twin(tensor, memo)
        made = copy.deepcopy(value, memo)
    memo[id(value)] = made
    return made
