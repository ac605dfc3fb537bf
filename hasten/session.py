"""One attachment to one host: what was replaced on it, and how to put it back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

_ABSENT = object()
_SHADOWS = "_hasten_shadows"
_STATE = "__getstate__"


class _Shadow:
    """What stood in an owner's `__dict__` before an attribute was shadowed."""

    __slots__ = ("before",)

    def __init__(self, before: Any) -> None:
        self.before = before


def _put_back(owner: Any, name: str, shadow: _Shadow) -> None:
    shadows = owner.__dict__[_SHADOWS]
    stack: list[_Shadow] = shadows[name]
    position = stack.index(shadow)
    if position < len(stack) - 1:
        stack[position + 1].before = shadow.before
    elif shadow.before is _ABSENT:
        owner.__dict__.pop(name, None)
    else:
        object.__setattr__(owner, name, shadow.before)
    del stack[position]
    if not stack:
        del shadows[name]
    if not shadows:
        del owner.__dict__[_SHADOWS], owner.__dict__[_STATE]


def _plain_state(owner: Any) -> Any:
    """What a copy or a pickle of `owner` is made of: its `__dict__` as it was before anything was shadowed."""
    kind: Any = type(owner)
    state = kind.__getstate__(owner)
    if not isinstance(state, dict):
        return state
    plain = {name: value for name, value in state.items() if name not in (_SHADOWS, _STATE)}
    for name, stack in owner.__dict__[_SHADOWS].items():
        if stack[0].before is _ABSENT:
            plain.pop(name, None)
        elif name in plain:
            plain[name] = stack[0].before
    return plain


class Attachment:
    """Replaces attributes on instances and restores them exactly, in reverse order.

    Only instances are touched, through their own `__dict__`, so that classes, other instances and
    `nn.Module` registration stay as they are. A copy of such an instance (`copy`, `pickle`) is a plain one.
    """

    def __init__(self) -> None:
        self._undo = ExitStack()

    def replace(self, owner: Any, name: str, new: Any) -> Any:
        """Shadow `owner.name` with `new` until `restore`; returns what it was."""
        old = getattr(owner, name)
        shadow = _Shadow(owner.__dict__.get(name, _ABSENT))
        # The order in which attachments shadow one attribute is kept on the owner itself, so that they may be
        # undone in any order: an upper one then restores what a lower one had found.
        stack: list[_Shadow] = owner.__dict__.setdefault(_SHADOWS, {}).setdefault(name, [])
        stack.append(shadow)
        # copy and pickle ask the instance for its state, so that this name needs no change of its class.
        owner.__dict__.setdefault(_STATE, functools.partial(_plain_state, owner))
        # object.__setattr__ goes past nn.Module's registration, which would refuse or rename.
        object.__setattr__(owner, name, new)
        self._undo.callback(_put_back, owner, name, shadow)
        return old

    def on_restore(self, call: Callable[[], Any]) -> None:
        """Run `call` when the attachment is undone."""
        self._undo.callback(call)

    def restore(self) -> None:
        """Put everything back; safe to call twice."""
        self._undo.close()
