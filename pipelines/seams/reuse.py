"""What a reuse policy may do to one network: the places where the denoiser gate asks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from hasten.caching.histories import Histories
from hasten.pipelines.host import Call
from hasten.step import Step

if TYPE_CHECKING:
    from hasten.pipelines.seams.denoiser_gate import DenoiserGate


class ReuseSeam:
    """Base of the seams, and the one of a recipe without reuse: computes everything, holds nothing.

    A seam is made once per network and session; `begin_run` starts it clean. A seam that finds its policy
    impossible on this network calls `gate.fall_back(policy, reason)`, which puts another seam in its place.

    change: what the latest decision was based on, for the trace.
    """

    change: float | None = None

    def __init__(self, gate: DenoiserGate) -> None:
        self.gate = gate

    def begin_run(self, times: Sequence[float]) -> None:
        """A run starts; nothing of an earlier one may be reused. times: `Step.time` of each step, where known."""

    def answer(self, step: Step, x: Tensor) -> list[Tensor] | None:
        """What stands in for all outputs of this call; None to compute it."""
        return None

    def compute(self, step: Step, call: Call, share: float) -> Any:
        """Run the network. share: how much of the batch `call` is. Must record at least one event."""
        return self.gate.timed(step, lambda: self.gate.evaluate(call), share=share)

    def observe(self, step: Step, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """The network's outputs are known; returns what the host gets."""
        return outputs

    def combined(self, value: Tensor) -> None:
        """The solver receives `value`, what the host made of all branches of this step."""

    @property
    def estimated_error(self) -> float | None:
        """Relative error of the final latents that skipping is estimated to have caused; None where nobody measured."""
        return None

    def num_bytes(self) -> int:
        """Bytes held for later steps."""
        return 0

    def forget(self) -> None:
        """Drop all tensors and skip nothing for the rest of this run."""

    def release(self) -> None:
        """Put back whatever was attached inside the network."""


class Remembering(Protocol):
    """State of one run that keeps what was computed inside the network."""

    @property
    def histories(self) -> Histories: ...


class HistorySeam(ReuseSeam):
    """Base of the seams that leave work out inside the network, with stand-ins from the `histories` of their state.

    The network's outputs are looked at on the device: what stands in for a branch that gave NaN or Inf is forgotten at
    its next decision.

    state: of this run; None before the first, and for the rest of one after `forget`.
    """

    state: Remembering | None

    def observe(self, step: Step, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        if self.state is not None:
            self.state.histories.check(step.branch, outputs)
        return outputs

    def num_bytes(self) -> int:
        return 0 if self.state is None else self.state.histories.num_bytes()

    def forget(self) -> None:
        self.state = None
