"""How a job tells where it stands: phases, steps, times, memory. What it tells goes to whoever runs it, coalesced there."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from hasten.ui.engine.cancel import Cancelled
from hasten.ui.engine.snapshot import Snapshot

Tell = Callable[[Snapshot], None]

FASTEST = 0.05
"""Seconds between two snapshots of steps, at least; phases are always told."""


class Report:
    """The one who tells. tell: is given each snapshot. stopped: asked whether to stop."""

    def __init__(self, job: str, tell: Tell, stopped: Callable[[], bool]) -> None:
        self._tell, self.stopped = tell, stopped
        self._began = self._phase_began = time.monotonic()
        self._stepped = 0.0
        self._one = threading.Lock()  # a study's clock tells, too
        self._first = 0
        self.now = Snapshot(job, state="running", phase="Starting")

    def check(self) -> None:
        """Raise `Cancelled` where the job is to stop. Asked before each block of work, so it does nothing else."""
        if self.stopped():
            raise Cancelled

    def phase(self, name: str, steps: int = 0, step: int = 0) -> None:
        """A new part of the work begins; its steps, where they can be counted."""
        self.check()
        self._phase_began, self._first = time.monotonic(), step
        self._put(phase=name, step=step, steps=steps, seconds_per_step=None, seconds_left=None)

    def step(self, step: int, steps: int, *, skipped: float | None = None) -> None:
        """`step` of `steps` are done in this phase."""
        now = time.monotonic()
        if now - self._stepped < FASTEST and step < steps:
            return
        self._stepped = now
        done = step - self._first
        each = (now - self._phase_began) / done if done > 0 else None
        left = each * (steps - step) if each is not None else None
        self._put(step=step, steps=steps, seconds_per_step=each, seconds_left=left, skipped=skipped if skipped is not None else self.now.skipped)

    def left(self, seconds: float, whole: float) -> None:
        """How much of the time that was given is left, where that is what ends the work."""
        self._put(seconds_left=max(0.0, seconds), step=int(max(0.0, whole - seconds)), steps=int(whole))

    def note(self, sentence: str) -> None:
        """A sentence for the user."""
        self._put(note=sentence[:500])

    def data(self, **values: Any) -> None:
        """What only this kind of job has (see `Snapshot`)."""
        self._put(values)

    def preview(self, name: str) -> None:
        """Another picture of the latents."""
        self._put(preview=name)

    def _put(self, data: dict[str, Any] | None = None, **changes: Any) -> None:
        with self._one:
            both = self.now.data if data is None else {**self.now.data, **data}
            self.now = self.now.but(seconds=time.monotonic() - self._began, memory=memory(), data=both, **changes)
            self._tell(self.now)


def memory() -> int:
    """Bytes: of the accelerator at most so far, else of this process now."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)
