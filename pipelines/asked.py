"""What a call of a pipeline asks for, heard before it has done anything.

A pipeline's call cannot be shadowed on one instance, since Python looks `__call__` up on the class. Nearly all pipelines of
diffusers check their inputs first, by a method that can be; the numbers are in the call's own frame then.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hasten.session import Attachment

SIZES = ("height", "width", "num_frames")
STEPS = "num_inference_steps"
Heard = Callable[[dict[str, int]], None]


def hear(hold: Attachment, host: Any, told: Heard) -> bool:
    """Until `hold` is restored, tell `told` at the beginning of each call of `host` how many steps and what size it asks for.

    What is told has those of `STEPS` and `SIZES` that are known by then: no steps where the caller brings levels of its own, no
    sizes that the pipeline works out later. False for a host whose calls cannot be heard, which is left alone.
    """
    check = getattr(host, "check_inputs", None)
    if not callable(check):
        return False

    @functools.wraps(check)
    def heard(*args: Any, **kwargs: Any) -> Any:
        told(_asked_by(host))
        return check(*args, **kwargs)

    hold.replace(host, "check_inputs", heard)
    return True


@contextmanager
def hearing(host: Any) -> Iterator[dict[str, int]]:
    """What the calls that are made in it ask for; of several, the last."""
    hold, found = Attachment(), dict[str, int]()
    hear(hold, host, found.update)
    try:
        yield found
    finally:
        hold.restore()


def _asked_by(host: Any) -> dict[str, int]:
    """The numbers in the frame of the call of `host` that is in progress; none where there is no such frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is host):
        frame = frame.f_back
    if frame is None:
        return {}
    values = frame.f_locals
    own_levels = any(values.get(name) is not None for name in ("timesteps", "sigmas"))
    names = SIZES if own_levels else (STEPS, *SIZES)
    return {name: values[name] for name in names if type(values.get(name)) is int}
