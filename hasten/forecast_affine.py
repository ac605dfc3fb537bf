"""Forecasts and repairs that were fitted beforehand: per step and channel, a scale and a shift."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.forecast import Forecast, ForecastState
from hasten.part import Part

SAME_TIME = 1e-3
"""Times at most this far apart are the same step: solvers round them, and YAML keeps five digits."""


class ChannelTable(Part):
    """Scale and shift of every channel at some times: y' = scale * y + shift.

    times: (T,) ascending, in `Step.time`. scale, shift: (T, C). dim: the channels' dimension, 1 for latents,
    -1 for tokens. At other times, and for tensors with another number of channels, nothing is changed.
    """

    times: tuple[float, ...] = ()
    scale: tuple[tuple[float, ...], ...] = ()
    shift: tuple[tuple[float, ...], ...] = ()
    dim: int = Field(1, ge=-1, le=1)

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        if list(self.times) != sorted(self.times):
            raise ValueError("times must ascend")
        rows = (len(self.times), len(self.scale), len(self.shift))
        widths = {len(row) for row in (*self.scale, *self.shift)}
        if len(set(rows)) > 1 or len(widths) > 1:
            raise ValueError(f"times, scale and shift need as many rows each and rows of one length, got {rows} rows")
        return self

    def start(self) -> ChannelState:
        """The table with its rows on the device of what they are applied to."""
        return ChannelState(self)

    def row(self, t: float) -> int | None:
        """Which row belongs to time t; None when there is none."""
        spot = bisect.bisect_left(self.times, t - SAME_TIME)
        near = [i for i in (spot, spot + 1) if i < len(self.times) and abs(self.times[i] - t) <= SAME_TIME]
        return min(near, key=lambda i: abs(self.times[i] - t), default=None)


class ChannelState:
    """A table whose rows are moved to where the values are, once."""

    def __init__(self, table: ChannelTable) -> None:
        self.table = table
        self.rows: Tensor | None = None

    def apply(self, t: float, y: Tensor) -> Tensor:
        """scale * y + shift at time t, in at least float32 and back; `y` itself where the table is silent."""
        table, row = self.table, self.table.row(t)
        if row is None or y.ndim < 2 or y.shape[table.dim] != len(table.scale[row]):
            return y
        if self.rows is None or self.rows.device != y.device:
            self.rows = torch.tensor([table.scale, table.shift], device=y.device)
        shape = [1] * y.ndim
        shape[table.dim] = -1
        scale, shift = self.rows[0, row].view(shape), self.rows[1, row].view(shape)
        return (y.to(torch.promote_types(y.dtype, torch.float32)) * scale + shift).to(y.dtype)


class Affine(Forecast):
    """The last computed value, corrected per channel as calibration runs taught: a y + b.

    CacheQuant (arXiv 2503.01323), decoupled error correction: the error of holding a value is mostly a change of
    scale and of mean per channel, the same for all prompts; `hasten.pipelines.cachequant.calibrate` fits a and b.
    It knows one schedule: `refusal` says so when a run has other times, and the value is then held as it is.

    run: every `Step.time` of the runs it was fitted on. table: a and b of the steps that are not computed.
    """

    kind: ClassVar[str] = "affine"
    run: tuple[float, ...] = ()
    table: ChannelTable = ChannelTable()

    def start(self) -> ForecastState:
        return _Held(self.table.start())

    def refusal(self, times: Sequence[float]) -> str:
        known = ChannelTable(times=tuple(sorted(self.run)), scale=((),) * len(self.run), shift=((),) * len(self.run))
        strange = [t for t in times if known.row(t) is None]
        if not strange:
            return ""
        return (
            f"the recipe was calibrated for runs of {len(self.run)} steps; {len(strange)} of the {len(times)} steps of"
            " this run are at other noise levels and are held without correction. Calibrate for this run, or use its"
            " number of steps."
        )


class _Held:
    def __init__(self, table: ChannelState) -> None:
        self.table = table
        self.node = 0.0
        self.value: Tensor | None = None

    @property
    def ready(self) -> bool:
        return self.value is not None

    def store(self, t: float, y: Tensor) -> None:
        self.node, self.value = t, y

    def estimate(self, t: float) -> Tensor:
        assert self.value is not None
        corrected = self.value if t == self.node else self.table.apply(t, self.value)
        return corrected.clone() if corrected is self.value else corrected

    def tensors(self) -> list[Tensor]:
        return [] if self.value is None else [self.value]
