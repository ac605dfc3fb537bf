"""A training that is told to end (SIGTERM: a cluster's time is up, a container stops; or by its caller) ends behind a step, with a
checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hasten.errors import StoppedError

Ended = Callable[[], bool]
"""Asked after each step, in every process: is the training to end here?"""


def never() -> bool:
    """Nobody else says when to end."""
    return False


@contextmanager
def ending(also: Ended = never) -> Iterator[Ended]:
    """While open, SIGTERM does not kill; the function that is given says whether it came, or `also` says so. Signals belong to the
    main thread: in others they stay as they are."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield also
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        yield lambda: bool(told) or also()
    finally:
        signal.signal(signal.SIGTERM, before)


def check_finished(done: int, steps: int, stop_after: int | None) -> None:
    """Raises `StoppedError` for a training that ended before it was to: behind step `done`."""
    if done < min(steps, stop_after or steps):
        raise StoppedError(f"Stopped after step {done} of {steps}, with a checkpoint. Go on with --resume.")
