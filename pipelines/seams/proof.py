"""Proof on the spot: skipping on the very input that was just computed may lose nothing, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.pipelines.host import Output

TOLERANCE, TOLERANCE_HALF = 1e-3, 5e-2
"""A skipped evaluation may differ from the computed one by this much (relative, max norm)."""


def loss_of_repeat(computed: Any, forward: Callable[[], Any]) -> str:
    """Why `forward`, which skips, does not give `computed` again; "" when it does. One host synchronisation."""
    wanted = Output(computed).tensors
    try:
        got = Output(forward()).tensors
    except Exception as error:  # noqa: BLE001 - any failure of a skipped evaluation is a reason not to skip
        return f"an evaluation that skips fails: {type(error).__name__}: {error}"
    if not wanted or [y.shape for y in got] != [y.shape for y in wanted]:
        return "an evaluation that skips returns something else"
    if not all(bool(torch.isfinite(y).all()) for y in wanted):
        return ""  # nothing can be learnt from a NaN; its history is dropped anyway
    loss = max(map(_distance, wanted, got))
    tolerance = TOLERANCE if wanted[0].dtype in (torch.float32, torch.float64) else TOLERANCE_HALF
    return "" if loss <= tolerance else f"skipping changes the output by {loss:.1e} on identical input"


def _distance(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|a|."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
