"""Module reuse on one network: find its modules, prove that skipping them loses nothing, else fall back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hasten.caching.histories import Key, key_of
from hasten.caching.modules import Family, ModuleReuse, ModuleState
from hasten.caching.network import NetworkReuse
from hasten.pipelines.host import Call, is_whole_compiled
from hasten.pipelines.seams.module_gate import ModuleGates, Walk
from hasten.pipelines.seams.proof import loss_of_repeat
from hasten.pipelines.seams.reuse import HistorySeam
from hasten.step import Step
from hasten.trace import Event

if TYPE_CHECKING:
    from hasten.pipelines.seams.denoiser_gate import DenoiserGate


class ModuleSeam(HistorySeam):
    """Puts `ModuleReuse` onto one network."""

    def __init__(self, gate: DenoiserGate, policy: ModuleReuse) -> None:
        super().__init__(gate)
        self.policy = policy
        self.state: ModuleState | None = None
        self.gates: ModuleGates | None = None
        if is_whole_compiled(gate.model):
            self._refuse("the whole network is one compiled function")
            return
        self.gates = ModuleGates(gate.model)
        if not self.gates.sites:
            self._refuse(self._none_found())

    def begin_run(self, times: Sequence[float]) -> None:
        self.state = self.policy.start(times)
        self.state.histories.agree = self.gate.agree
        compiled = self.gates.compiled() if self.gates is not None else ""
        if compiled:
            self._refuse(f"{compiled} lies inside a block that has been compiled")

    def compute(self, step: Step, call: Call, share: float) -> Any:
        """Run the network with its modules gated."""
        state, gates = self.state, self.gates
        if state is None or gates is None:
            return super().compute(step, call, share)
        state.begin(step)
        events: list[Event] = []
        spare = call.copy()
        result = self.gate.timed(
            step, lambda: self._walk(step, call, state, events), share=share, events=events
        )
        if not gates.learned and not self.gate.repeatable(spare):
            gates.look_again()
        elif not gates.learned:
            self._learn(step, spare, result)
        return result

    def release(self) -> None:
        if self.gates is not None:
            self.gates.detach()

    # --- inside -----------------------------------------------------------------------------------

    def _walk(self, step: Step, call: Call, state: ModuleState, events: list[Event]) -> Any:
        assert self.gates is not None
        walk = Walk(self.gates, step, state, key_of(call.sample))
        result = self.gates.run(lambda: self.gate.evaluate(call), walk)
        events.append(self.gate.event(step, "compute"))
        for family, numbers in walk.skipped.items():
            site = f"{self.gate.site}.{family}"
            for start, stop in _runs(numbers):
                events.append(self.gate.event(step, self.gate.stand_in_action(), site, (start, stop)))
        return result

    def _learn(self, step: Step, call: Call, computed: Any) -> None:
        """The first evaluation has shown what the modules are; now prove that they can be left out."""
        gates, gate, state = self.gates, self.gate, self.state
        assert gates is not None and state is not None
        gates.learn(set(self.policy.rules))
        if not gates.sites:
            self._refuse(self._none_found())
            return
        walk = Walk(gates, step, Proof(state), key_of(call.sample))
        loss = loss_of_repeat(computed, lambda: gates.run(lambda: gate.rehearse(call), walk))
        if loss:
            self._refuse(loss)
            return
        state.histories.keep({site.name for site in gates.sites})
        for family in self.policy.rules:
            if not gates.counts[family]:
                gate.session.note(f"{gate.site}: it has no {family}, so that rule does nothing.", warn=False)
        for reason in sorted(set(gates.refused.values())):
            names = [name for name, why in gates.refused.items() if why == reason]
            gate.session.note(f"{gate.site}: {len(names)} modules ({names[0]}, ...) are always computed: {reason}.", warn=False)
        gate.session.trace.structure.pop(gate.site, None)
        gate.session.trace.structure.update({f"{gate.site}.{name}": num for name, num in gates.counts.items() if num})

    def _none_found(self) -> str:
        assert self.gates is not None
        reasons = sorted(set(self.gates.refused.values()))
        found = f"; those that look like it: {', '.join(reasons)}" if reasons else ""
        return f"no {' or '.join(self.policy.rules)} module was found that can be skipped{found}"

    def _refuse(self, reason: str) -> None:
        """Modules cannot be skipped on this network: cache the whole network instead."""
        rule = next(iter(self.policy.rules.values()))
        self.gate.fall_back(
            NetworkReuse(rule=rule, forecast=self.policy.forecast), f"module caching is refused ({reason})"
        )


class Proof(ModuleState):
    """A look at a state that was just filled, under which everything is skipped; changes nothing."""

    def __init__(self, filled: ModuleState) -> None:
        super().__init__(filled.policy)
        self.histories = filled.histories

    def answer(self, step: Step, site: str, family: Family, key: Key) -> list[Tensor] | None:
        return self.histories.estimate(step.branch, site, key, self._coordinate(step))

    def observe(self, step: Step, site: str, key: Key, values: list[Tensor]) -> None:
        return None


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Half-open ranges of neighbouring numbers, which come in rising order."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found
