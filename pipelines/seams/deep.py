"""Deep-feature reuse on one U-Net: cut it, prove that a shallow evaluation loses nothing, else fall back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from hasten.caching.deep import DeepReuse, DeepState
from hasten.caching.histories import Key, key_of
from hasten.caching.network import NetworkReuse
from hasten.pipelines.host import Call, is_whole_compiled
from hasten.pipelines.seams.deep_gate import DeepGates, Shapes, Walk
from hasten.pipelines.seams.proof import loss_of_repeat
from hasten.pipelines.seams.reuse import HistorySeam
from hasten.pipelines.seams.unet_layers import cut
from hasten.step import Step

if TYPE_CHECKING:
    from hasten.pipelines.seams.denoiser_gate import DenoiserGate

SITE = "layers"
"""Name of the U-Net's layers in the trace, counted in the order in which they run."""


class DeepSeam(HistorySeam):
    """Puts `DeepReuse` onto one U-Net.

    ControlNet and T2I-Adapter residuals of the present step apply to the shallow connections; those that enter below
    the cut are part of the deep feature. When an argument appears or disappears, the step is computed.
    """

    def __init__(self, gate: DenoiserGate, policy: DeepReuse) -> None:
        super().__init__(gate)
        self.policy = policy
        self.state: DeepState | None = None
        self.gates: DeepGates | None = None
        self._shapes: dict[Key, Shapes] = {}
        self._proved = False
        where = unsuitable(gate.model) or cut(gate.model, policy.branch)
        if isinstance(where, str):
            self._refuse(where)
            return
        self.cut = where
        self.gates = DeepGates(gate.model, where)
        self.gates.attach()
        gate.session.trace.structure.pop(gate.site, None)
        gate.session.trace.structure[f"{gate.site}.{SITE}"] = where.total

    def begin_run(self, times: Sequence[float]) -> None:
        self.state, self._shapes = self.policy.start(times), {}
        self.state.histories.agree = self.gate.agree
        again = cut(self.gate.model, self.policy.branch) if self.gates is not None else ""
        if isinstance(again, str) and again:
            self._refuse(again)

    def compute(self, step: Step, call: Call, share: float) -> Any:
        """Run the network, all of it or only its shallow end."""
        state, gates = self.state, self.gates
        if state is None or gates is None:
            return super().compute(step, call, share)
        key, spare = _key(call), call.copy()
        feature = state.answer(step, key)
        walk = Walk(self._shapes.setdefault(key, Shapes()), feature)
        events = [self.gate.event(step, "compute")]

        def evaluate() -> Any:
            value = self._run(call, walk)
            if walk.feature is not None:
                action = self.gate.stand_in_action()
                events.append(self.gate.event(step, action, f"{self.gate.site}.{SITE}", self.cut.skipped))
            return value

        result = self.gate.timed(step, evaluate, share=share, events=events)
        if walk.deep is not None:
            state.observe(step, key, walk.deep)
            self._prove(spare, walk, result)
        return result

    def forget(self) -> None:
        super().forget()
        self._shapes = {}

    def release(self) -> None:
        if self.gates is not None:
            self.gates.detach()

    # --- inside -----------------------------------------------------------------------------------

    def _run(self, call: Call, walk: Walk, *, ours: bool = False) -> Any:
        assert self.gates is not None
        evaluate = self.gate.rehearse if ours else self.gate.evaluate
        return self.gates.run(lambda: evaluate(call), walk)

    def _prove(self, call: Call, walk: Walk, computed: Any) -> None:
        """Once per session: the shallow end alone, on the very input that was just computed, gives the same."""
        if self._proved or not self.gate.repeatable(call):
            return
        self._proved = True
        assert walk.deep is not None
        loss = loss_of_repeat(computed, lambda: self._run(call, Walk(walk.shapes, walk.deep), ours=True))
        if loss:
            self._refuse(loss)

    def _refuse(self, reason: str) -> None:
        """This network cannot be cut: cache the whole network instead."""
        policy = NetworkReuse(rule=self.policy.rule, forecast=self.policy.forecast)
        self.gate.fall_back(policy, f"deep caching is refused ({reason})")


def unsuitable(model: nn.Module) -> str:
    """Why no gates can be put on `model`, whatever its layout; "" when they can."""
    if is_whole_compiled(model):
        return "it is one compiled function"
    if "mid_block" in vars(model):  # zeros that one session returns for what it leaves out would be the other's feature
        return "another open session leaves out its deep part; close that one first"
    return ""


def _key(call: Call) -> Key:
    """What must be the same for the deep feature to be used: the input's kind, and which arguments are given."""
    given = tuple(sorted(name for name in call.layout.names if call.get(name) is not None))
    return (*key_of(call.sample), given)
