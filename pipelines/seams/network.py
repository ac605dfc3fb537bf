"""Whole-network reuse on one network: a call is answered or computed, nothing inside is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hasten.caching.network import NetworkReuse, NetworkState
from hasten.pipelines.seams.reuse import ReuseSeam
from hasten.step import Step

if TYPE_CHECKING:
    from hasten.pipelines.seams.denoiser_gate import DenoiserGate


class NetworkSeam(ReuseSeam):
    """Puts `NetworkReuse` onto one network."""

    def __init__(self, gate: DenoiserGate, policy: NetworkReuse) -> None:
        super().__init__(gate)
        self.policy = policy
        self.state: NetworkState | None = None

    def begin_run(self, times: Sequence[float]) -> None:
        policy = self.policy.model_copy(update={"forecast": self.policy.forecast.on(times)})
        self.state = policy.start(times)
        self.state.agree = self.gate.agree
        if self.gate.session.spending is not None:
            self.state.share(self.gate.session.spending.account)

    def answer(self, step: Step, x: Tensor) -> list[Tensor] | None:
        if self.state is None:
            return None
        skips = self.state.decide(step, x)
        self.change = self.state.change
        return self.state.answer(step, x) if skips else None

    def observe(self, step: Step, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        return outputs if self.state is None else self.state.observe(step, x, outputs)

    def combined(self, value: Tensor) -> None:
        if self.state is not None:
            self.state.combined(value)

    @property
    def estimated_error(self) -> float | None:
        return None if self.state is None else self.state.estimated_error

    def num_bytes(self) -> int:
        return 0 if self.state is None else self.state.num_bytes()

    def forget(self) -> None:
        self.state = None
