"""Width on one network: find what can be cut, prove on the spot that cutting is right, else fall back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hasten.caching.histories import key_of
from hasten.caching.network import NetworkReuse
from hasten.caching.width import WidthReuse, WidthState
from hasten.pipelines.host import Call, is_whole_compiled
from hasten.pipelines.seams.reuse import ReuseSeam
from hasten.pipelines.seams.width_gate import WidthGates, WidthWalk
from hasten.pipelines.seams.writes import twin
from hasten.step import Step
from hasten.trace import Event

if TYPE_CHECKING:
    from hasten.pipelines.seams.denoiser_gate import DenoiserGate


class WidthSeam(ReuseSeam):
    """Puts `WidthReuse` onto one network."""

    def __init__(self, gate: DenoiserGate, policy: WidthReuse) -> None:
        super().__init__(gate)
        self.policy = policy
        self.state: WidthState | None = None
        self.gates: WidthGates | None = None
        self.learned = False
        if is_whole_compiled(gate.model):
            self._refuse("the whole network is one compiled function")
            return
        self.gates = WidthGates(gate.model)
        if not self.gates.sites:
            self._refuse(self._none_found())

    def begin_run(self, times: Sequence[float]) -> None:
        self.state = self.policy.start(times)
        self.state.rests.agree = self.gate.agree

    def compute(self, step: Step, call: Call, share: float) -> Any:
        """Run the network at its width at this step."""
        if self.state is None or self.gates is None:
            return super().compute(step, call, share)
        if not self.learned and not self._learn(call):
            # Refused: another seam has taken over. Or blinded by a NaN: in full now, and looked at again next time.
            return super().compute(step, call, share) if self.gate.seam is self else self.gate.seam.compute(step, call, share)
        if not self.gate.repeatable(call):  # modules that write run once, so they cannot run in two parts
            return super().compute(step, call, share)
        state, gates, events = self.state, self.gates, list[Event]()
        state.begin(step)

        def work() -> Any:
            walk = WidthWalk(gates, step, state, key_of(call.sample))
            result = gates.run(lambda: self.gate.evaluate(call), walk)
            events.append(self.gate.event(step, "compute", share=walk.share))
            return result

        return self.gate.timed(step, work, share=share, events=events)

    def observe(self, step: Step, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        if self.state is not None and self.state.holds:
            self.state.rests.check(step.branch, outputs)
        return outputs

    def num_bytes(self) -> int:
        return 0 if self.state is None else self.state.rests.num_bytes()

    def forget(self) -> None:
        self.state = None

    def release(self) -> None:
        if self.gates is not None:
            self.gates.detach()

    # --- inside -----------------------------------------------------------------------------------

    def _learn(self, call: Call) -> bool:
        """The first call of all: evaluate once more, in full, to learn and to prove. False when that led to nothing.

        Its result is thrown away, so that the first run of a session decides exactly like the later ones.
        """
        gates, gate, spare = self.gates, self.gate, twin(call)
        assert gates is not None
        self.learned = gates.learn(lambda: gate.rehearse(spare), self.policy.order, gate.agree)
        if not self.learned:
            return False
        if not gates.sites:
            self._refuse(self._none_found())
            return False
        gate.session.note(f"{gate.site}: one extra evaluation was spent on finding what can be cut.", warn=False)
        for reason in sorted(set(gates.refused.values())):
            names = [name for name, why in gates.refused.items() if why == reason]
            gate.session.note(f"{gate.site}: {len(names)} modules ({names[0]}, ...) always run in full: {reason}.", warn=False)
        return True

    def _none_found(self) -> str:
        assert self.gates is not None
        reasons = sorted(set(self.gates.refused.values()))
        found = f"; those that look like it: {', '.join(reasons)}" if reasons else ""
        return f"no attention or feed-forward module was found that can be cut{found}"

    def _refuse(self, reason: str) -> None:
        """Nothing can be cut on this network: cache it as a whole instead."""
        rule = {} if self.policy.rule is None else {"rule": self.policy.rule}
        self.gate.fall_back(NetworkReuse(**rule), f"running at part of the width is refused ({reason})")
