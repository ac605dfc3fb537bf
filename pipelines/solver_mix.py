"""A first-order scheduler of diffusers that is given a mix of the outputs so far: a multistep solver by weights.

Shapes: y [B, ...] what the pipeline hands to the scheduler, its branches combined.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hasten.forecast import combine


def mixing(scheduler: Any, weights: Sequence[Sequence[float]]) -> Any:
    """Give `scheduler`, which is nobody else's, the sum over j of weights[k][j] y_(k-j) in the place of y_k.

    In a run that starts later (image to image) what the outputs before its first would weigh is the oldest one's.
    """
    given, plain = scheduler.set_timesteps, scheduler.step
    most = max(len(row) for row in weights)
    seen: list[Tensor] = []
    place = 0

    @functools.wraps(given)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        given(*args, **kwargs)
        seen.clear()

    @functools.wraps(plain)
    def step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal place
        place = place + 1 if seen else int(scheduler.begin_index or 0)
        seen.insert(0, model_output)
        del seen[most:]
        row = list(weights[min(place, len(weights) - 1)])
        known = [*row[: len(seen) - 1], sum(row[len(seen) - 1 :])] if len(row) > len(seen) else row
        return plain(combine(known, seen[: len(known)]), *args, **kwargs)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    return scheduler
