"""One attachment to one host: what was replaced on it, and how to put it back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

_ABSENT = object()


class Attachment:
    """Replaces attributes on instances and restores them exactly, in reverse order.

    Only instances are touched, through their own `__dict__`, so that classes, other instances and
    `nn.Module` registration stay as they are.
    """

    def __init__(self) -> None:
        self._undo = ExitStack()

    def replace(self, owner: Any, name: str, new: Any) -> Any:
        """Shadow `owner.name` with `new` until `restore`; returns what it was."""
        before = owner.__dict__.get(name, _ABSENT)
        old = getattr(owner, name)
        # object.__setattr__ goes past nn.Module's registration, which would refuse or rename.
        object.__setattr__(owner, name, new)

        def put_back() -> None:
            if before is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                object.__setattr__(owner, name, before)

        self._undo.callback(put_back)
        return old

    def on_restore(self, call: Callable[[], Any]) -> None:
        """Run `call` when the attachment is undone."""
        self._undo.callback(call)

    def restore(self) -> None:
        """Put everything back; safe to call twice."""
        self._undo.close()
