"""Signals: how far has the computation moved, judged without running the network."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from hasten.drift import relative_l1
from hasten.part import Part
from hasten.step import Step


class SignalState(Protocol):
    """Running state of a signal for the branch that decides."""

    def measure(self, step: Step, x: Tensor) -> Tensor | None:
        """What is expected at `step` with input `x`, a 0-d tensor on its device; None when unknown."""

    def observe(self, step: Step, x: Tensor, y: Tensor) -> None:
        """The network was computed: `y` at input `x`."""

    def tensors(self) -> list[Tensor]:
        """What is held, so that bytes can be counted."""


class Signal(Part):
    """Family of signals.

    signed: False for a relative change, which is 0 when nothing moves and is compared with a limit above 0; True for
    a criterion in [-1, 1] that is negative where a step may be skipped, which goes with `Drift(limit=0, accumulate=False)`.
    """

    signed: ClassVar[bool] = False

    def start(self) -> SignalState:
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class OutputChange(Signal):
    """Predicts the change of the output from the change of the input (EasyCache, arXiv 2507.02860, eq. 5-8).

    k = |y - y'| / |x - x'| between the last two computed steps; each later step adds
    k |x_t - x_(t-1)| / |y|. Norms are means of absolute values. Needs no knowledge of the network.
    """

    kind: ClassVar[str] = "output_change"

    def start(self) -> SignalState:
        return _OutputChange()


class InputChange(Signal):
    """Relative L1 change of the network's input since the previous step. The cheapest signal."""

    kind: ClassVar[str] = "input_change"

    def start(self) -> SignalState:
        return _InputChange()


class _OutputChange:
    def __init__(self) -> None:
        self.previous: Tensor | None = None
        self.computed: tuple[Tensor, Tensor] | None = None
        self.rate: Tensor | None = None
        self.size: Tensor | None = None

    def measure(self, step: Step, x: Tensor) -> Tensor | None:
        previous, self.previous = self.previous, x.clone()  # a host may update its latents in place
        if previous is None or previous.shape != x.shape or self.rate is None or self.size is None:
            return None
        return self.rate * _mean_abs(x - previous) / self.size

    def observe(self, step: Step, x: Tensor, y: Tensor) -> None:
        if y.shape != x.shape:  # networks that also return a variance: only the mean moves like the input
            y = y[:, : x.shape[1]]
        if self.computed is not None and self.computed[0].shape == x.shape:
            old_x, old_y = self.computed
            self.rate = _mean_abs(y - old_y) / _mean_abs(x - old_x)
        self.size = _mean_abs(y)
        self.computed = (x.clone(), y.clone())

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.previous, *(self.computed or ())) if t is not None]


class _InputChange:
    def __init__(self) -> None:
        self.previous: Tensor | None = None

    def measure(self, step: Step, x: Tensor) -> Tensor | None:
        previous, self.previous = self.previous, x.clone()  # a host may update its latents in place
        return None if previous is None or previous.shape != x.shape else relative_l1(x, previous)

    def observe(self, step: Step, x: Tensor, y: Tensor) -> None:
        return None

    def tensors(self) -> list[Tensor]:
        return [] if self.previous is None else [self.previous]


def _mean_abs(x: Tensor) -> Tensor:
    return x.float().abs().mean().clamp_min(1e-12)
