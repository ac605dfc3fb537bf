"""Splitting prompts over the processes of `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.generate import Prompt

T = TypeVar("T")


class Ranks:
    """This process among those that share one request. Alone, everything here is a no-op.

    first: whether this one speaks for all.
    """

    def __init__(self, state: Any = None) -> None:
        self._state = state
        self.index = state.process_index if state else 0
        self.count = state.num_processes if state else 1
        self.first = self.index == 0

    @classmethod
    def start(cls, device: str | None) -> Ranks:
        """Join the other processes where a launcher started several. device: what the user asked for."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        # Ranks meet only at the end, so the slowest may be hours behind the fastest.
        state = PartialState(cpu=device == "cpu" or None, timeout=timedelta(days=7))
        if device not in (None, "cpu", "cuda"):
            raise UsageError(
                f"--device {device}: each process gets its own device. Leave it out, or say cpu."
            )
        return cls(state)

    def share(self, prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
        """Every `count`-th prompt; numbers and seeds stay, so the files are those of one process alone."""
        return prompts[self.index :: self.count]

    def device(self, asked: str | None) -> str | None:
        return str(self._state.device) if self._state else asked

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, on each of them."""
        if self._state is None:
            return list(items)
        from accelerate.utils import gather_object

        return list(gather_object(list(items)))

    def close(self) -> None:
        if self._state is not None:
            self._state.destroy_process_group()
