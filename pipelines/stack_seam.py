"""Block reuse on one network: learn its structure, prove that skipping loses nothing, else fall back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.caching.network import NetworkReuse
from hasten.caching.stack import StackReuse, StackState
from hasten.drift import Drift
from hasten.pipelines.host import Call, Output, is_whole_compiled
from hasten.pipelines.reuse_seam import ReuseSeam
from hasten.pipelines.stack_gate import StackGates
from hasten.step import Step
from hasten.trace import Action, Event

if TYPE_CHECKING:
    from hasten.pipelines.denoiser_gate import DenoiserGate

SKIP_TOLERANCE, SKIP_TOLERANCE_HALF = 1e-3, 5e-2
"""A skipped pass on the very input that was just computed may differ by this much (relative, max norm)."""


class StackSeam(ReuseSeam):
    """Puts `StackReuse` onto one network."""

    def __init__(self, gate: DenoiserGate, policy: StackReuse) -> None:
        super().__init__(gate)
        self.policy = policy
        self.state: StackState | None = None
        self.gates: StackGates | None = None
        self._proved = False
        if is_whole_compiled(gate.model):
            self._refuse("the whole network is one compiled function; compile its blocks instead")
        else:
            self.gates = StackGates(gate.model, policy.lead)
            self.gates.attach()

    def begin_run(self, times: Sequence[float]) -> None:
        self.state = self.policy.start(times)

    def compute(self, step: Step, call: Call, share: float) -> Any:
        """Run the network with its blocks gated."""
        if self.state is None or self.gates is None:
            return super().compute(step, call, share)
        if not self.gates.stacks and not self._learn(call):
            return self.gate.seam.compute(step, call, share)
        events: list[Event] = []
        state = self.state
        result = self.gate.timed(
            step, lambda: self._walk(step, call, state, events), share=share, events=events
        )
        self.change = state.change
        if not self._proved:
            self._prove(step, call, result)
        return result

    def num_bytes(self) -> int:
        return 0 if self.state is None else self.state.num_bytes()

    def forget(self) -> None:
        self.state = None

    def release(self) -> None:
        if self.gates is not None:
            self.gates.detach()

    # --- inside -----------------------------------------------------------------------------------

    def _walk(self, step: Step, call: Call, state: StackState, events: list[Event]) -> Any:
        assert self.gates is not None

        def record(name: str, blocks: tuple[int, int], action: str, deciding: bool) -> None:
            kind: Action = "compute" if action == "compute" else self.gate.stand_in_action()
            signal = state.change if deciding else None
            events.append(self.gate.event(step, kind, f"{self.gate.site}.{name}", blocks, signal))

        return self.gates.run(lambda: self.gate.inner(*call.args, **call.kwargs), step, state, record)

    def _learn(self, call: Call) -> bool:
        """The first call of all: evaluate once more, to watch how the blocks are chained. False when refused.

        The result is thrown away, so that the first run of a session decides exactly like the later ones.
        """
        gates, gate = self.gates, self.gate
        assert gates is not None
        gates.watch(lambda: gate.inner(*call.args, **call.kwargs))
        if not gates.stacks:
            self._refuse("; ".join(gates.refused.values()))
            return False
        gates.restrict()
        gate.session.note(
            f"{gate.site}: one extra evaluation was spent on discovering its structure.", warn=False
        )
        for reason in gates.refused.values():
            gate.session.note(f"{gate.site}: {reason}; these blocks are always computed.", warn=False)
        gate.session.trace.structure.pop(gate.site, None)
        gate.session.trace.structure.update(
            {f"{gate.site}.{stack.name}": stack.num for stack in gates.stacks}
        )
        return True

    def _prove(self, step: Step, call: Call, computed: Any) -> None:
        """Skip all blocks on the very input that was just computed: nothing may be lost, or blocks are refused."""
        assert self.state is not None
        proof = Proof(self.state)
        try:
            skipped = Output(self._walk(step, call, proof, [])).tensors
            loss = max(map(_distance, Output(computed).tensors, skipped), default=float("inf"))
        except Exception as error:  # noqa: BLE001 - any failure of a skipped pass is a reason not to skip
            self._refuse(f"a pass without its blocks fails: {type(error).__name__}: {error}")
            return
        tolerance = (
            SKIP_TOLERANCE if Output(computed).tensors[0].dtype == torch.float32 else SKIP_TOLERANCE_HALF
        )
        if not loss <= tolerance:
            self._refuse(
                f"skipping its blocks changes the output by {loss:.1e} on identical input, so something other than"
                " an addition happens between them"
            )
        self._proved = True

    def _refuse(self, reason: str) -> None:
        """Blocks cannot be skipped on this network: cache the whole network instead."""
        rule = self.policy.rule
        if isinstance(
            rule, Drift
        ):  # a whole network's change is predicted per step, so it has to be added up
            rule = rule.model_copy(update={"accumulate": True})
        self.gate.fall_back(
            NetworkReuse(rule=rule, forecast=self.policy.forecast), f"block caching is refused ({reason})"
        )


class Proof(StackState):
    """A look at a state that was just filled, under which everything is skipped; changes nothing."""

    def __init__(self, filled: StackState) -> None:
        super().__init__(filled.policy)
        self.branches = filled.branches

    def decide(self, step: Step, lead: list[Tensor], shapes: list[torch.Size]) -> bool:
        return True


def _distance(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|a|."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
