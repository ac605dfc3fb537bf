"""Block reuse on one network: learn its structure, prove that skipping loses nothing, else fall back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.caching.network import NetworkReuse
from hasten.caching.spans import Piece
from hasten.caching.stack import ChosenTokens, StackReuse, StackState, key_of
from hasten.caching.stack_signals import Evidence
from hasten.drift import Drift
from hasten.pipelines.host import Call, Output, is_whole_compiled
from hasten.pipelines.seams.reuse import ReuseSeam
from hasten.pipelines.seams.stack_gate import StackGates
from hasten.pipelines.seams.stack_shadow import Outs, Shadow
from hasten.pipelines.seams.stack_walk import Walk
from hasten.pipelines.seams.token_rows import not_token_wise, shuffled
from hasten.pipelines.seams.writes import twin
from hasten.step import Step
from hasten.trace import Action, Event

if TYPE_CHECKING:
    from hasten.pipelines.seams.denoiser_gate import DenoiserGate

SKIP_TOLERANCE, SKIP_TOLERANCE_HALF = 1e-3, 5e-2
"""A skipped pass on the very input that was just computed may differ by this much (relative, max norm)."""


class StackSeam(ReuseSeam):
    """Puts `StackReuse` onto one network."""

    def __init__(self, gate: DenoiserGate, policy: StackReuse) -> None:
        super().__init__(gate)
        self.policy = policy
        self.state: StackState | None = None
        self.gates: StackGates | None = None
        self._proved: set[tuple[Piece, ...]] = set()
        self._tokens_proved, self._apart = policy.tokens is None, False
        self._shadowed = False
        if is_whole_compiled(gate.model):
            self._refuse("the whole network is one compiled function; compile its blocks instead")
        else:
            self.gates = StackGates(gate.model)
            self.gates.attach()

    def begin_run(self, times: Sequence[float]) -> None:
        self.state = self.policy.start(times)
        self.state.agree = self.gate.agree
        self.state.apart = self._apart
        if self.gates is not None:
            self.state.lay_out(self.gates.sizes, turns=self.gates.turns)

    def compute(self, step: Step, call: Call, share: float) -> Any:
        """Run the network with its blocks gated."""
        if self.state is None or self.gates is None:
            return super().compute(step, call, share)
        if not self.gates.stacks and not self._learn(step, call):
            return self.gate.seam.compute(step, call, share)
        events: list[Event] = []
        state, spare = self.state, call.copy()
        if isinstance(call.sample, Tensor):
            state.input = key_of([call.sample])
        result = self.gate.timed(step, lambda: self._walk(step, call, state, events), share=share, events=events)
        self.change = state.change
        if self.gate.repeatable(spare):
            self._prove(step, spare, result)
        return result

    def num_bytes(self) -> int:
        return 0 if self.state is None else self.state.num_bytes()

    def forget(self) -> None:
        self.state = None

    def release(self) -> None:
        if self.gates is not None:
            self.gates.detach()

    # --- inside -----------------------------------------------------------------------------------

    def _walk(self, step: Step, call: Call, state: StackState, events: list[Event], *, ours: bool = False) -> Any:
        """One evaluation with the gates following `state`. ours: the host has not asked for it."""
        assert self.gates is not None
        evaluate = self.gate.rehearse if ours else self.gate.evaluate

        def record(name: str, blocks: tuple[int, int], action: str, deciding: bool, share: float) -> None:
            kind: Action = "compute" if action == "compute" else self.gate.stand_in_action()
            signal = state.change if deciding else None
            why = "" if share == 1.0 else "a part of the tokens"
            events.append(self.gate.event(step, kind, f"{self.gate.site}.{name}", blocks, signal, why, share))

        spare, outs = call.copy(), Outs() if self._shadowed else None
        walk = Walk(self.gates.stacks, step, state, record, outs)
        result = self.gates.run(lambda: evaluate(call), walk)
        if outs is not None and not walk.skipping and self.gate.repeatable(spare):
            shadow = Shadow(self.gates.stacks, step, state, outs)
            self.gates.run(lambda: self.gate.rehearse(spare), shadow)
        return result

    def _shadow(self, reason: str) -> None:
        """From now on learn the pieces in a second pass without them."""
        self._shadowed = True
        self.gate.session.note(
            f"{self.gate.site}: {reason}, so computed steps run once more without the blocks that may be left out.", warn=False
        )

    def _learn(self, step: Step, call: Call) -> bool:
        """The first call of all: evaluate once more, to watch how the blocks are chained. False when refused.

        The result is thrown away, so that the first run of a session decides exactly like the later ones. Its arguments
        are copies, because it may write into them.
        """
        gates, gate = self.gates, self.gate
        assert gates is not None and self.state is not None
        try:
            blind = twin(call).blinded()
            gates.watch(lambda: gate.rehearse(blind))
        except Exception:  # noqa: BLE001 - a network that cannot be shown NaN is watched at its work
            spare = twin(call)
            gates.watch(lambda: gate.rehearse(spare))
        reason = self._nothing_left(step) if gates.stacks else "; ".join(gates.refused.values())
        if reason:
            self._refuse(reason)
            return False
        gates.restrict()
        gate.session.note(f"{gate.site}: one extra evaluation was spent on discovering its structure.", warn=False)
        for reason in gates.refused.values():
            gate.session.note(f"{gate.site}: {reason}; these blocks are always computed.", warn=False)
        if gates.always:
            gate.session.note(f"{gate.site}: {gates.always}, cannot be left out: the chain of blocks ends there.", warn=False)
        for remark in self.policy.remarks:
            gate.session.note(f"{gate.site}: {remark}.", warn=False)
        gate.session.trace.structure.pop(gate.site, None)
        gate.session.trace.structure.update({f"{gate.site}.{stack.name}": stack.num for stack in gates.stacks})
        self.state.lay_out(gates.sizes, turns=gates.turns)
        if gates.turns:
            self._shadow("its lists of blocks take turns")
        return True

    def _nothing_left(self, step: Step) -> str:
        """Why the policy leaves nothing out on a network of this depth; empty when it does."""
        assert self.gates is not None
        sizes, policy = self.gates.sizes, self.policy
        blocks = f"{' + '.join(map(str, sizes))} blocks"
        if policy.lead >= sizes[0]:
            return f"{self.gates.stacks[0].name}: {blocks}, and all of the first list are leading (lead = {policy.lead})"
        if not policy.itinerary(sizes, step.total).distinct():
            span = f"span {policy.span.kind!r}, lead = {policy.lead}, back = {policy.back}"
            return f"{blocks}, and {span} leaves none of them out at any step"
        if self.gates.turns and len(policy.itinerary(sizes, step.total).distinct()) > 1:
            return f"its lists of blocks take turns, and span {policy.span.kind!r} leaves out others at other steps"
        return ""

    # --- prove ------------------------------------------------------------------------------------

    def _prove(self, step: Step, call: Call, computed: Any) -> None:
        """Leave out, on the very input that was just computed, what will be left out: nothing may be lost.

        Every set of pieces of the run is tried once in a session, at the first computed call that has learned it.
        """
        state = self.state
        if state is None or step.branch not in state.branches:
            return
        for pieces in state.itinerary(step).distinct():
            if pieces in self._proved or not state.branches[step.branch].knows(pieces):
                continue
            if not all(bool(torch.isfinite(tensor).all()) for tensor in Output(computed).tensors):
                return  # nothing can be compared; a step computed so is not reused either
            loss = self._loss(call, step, computed, Proof(state, pieces))
            if loss and not self._shadowed and len(state.itinerary(step).distinct()) == 1:
                loss = self._prove_shadowed(step, call, computed, pieces) and loss
            if loss:
                self._refuse(loss)
                return
            self._proved.add(pieces)
            if not self._tokens_proved:
                self._prove_tokens(step, call, computed, pieces)

    def _prove_shadowed(self, step: Step, call: Call, computed: Any, pieces: tuple[Piece, ...]) -> str:
        """Something other than an addition happens between the blocks: is it enough to learn them in a second pass?"""
        assert self.state is not None
        if self.policy.tokens is not None:
            return "tokens run apart only where nothing but additions happens between blocks"
        self._shadowed, before = True, self.state.branches.pop(step.branch)
        self.state.decided = -1
        self._walk(step, call.copy(), self.state, [], ours=True)
        loss = self._loss(call, step, computed, Proof(self.state, pieces))
        self._shadowed = False
        if loss:
            self.state.branches[step.branch] = before
        else:
            self._shadow("something other than an addition happens between its blocks")
        return loss

    def _prove_tokens(self, step: Step, call: Call, computed: Any, pieces: tuple[Piece, ...]) -> None:
        """All tokens in another order must come out as before, in that order; else no token is run apart."""
        assert self.gates is not None and self.state is not None
        blocks = [block for stack in self.gates.stacks for block in getattr(self.gate.model, stack.name).children()]
        histories = self.state.branches[step.branch].histories.values()
        shapes = [shape for history in histories for shape, _, _ in history.key]
        reason = not_token_wise(self.gates.stacks, shapes, blocks)
        reason = reason or self._loss(call, step, computed, Proof(self.state, pieces, reorder=True))
        self._tokens_proved = True
        if reason:
            self.gate.session.note(
                f"{self.gate.site}: tokens cannot be run apart ({reason}); whole blocks are left out instead."
            )
            self.policy = self.policy.model_copy(update={"tokens": None})
            self.state.policy = self.policy
            return
        self._apart = self.state.apart = True
        # Once more, so that this step chooses tokens, and is seen by the signal, as in later runs.
        del self.state.branches[step.branch]
        self.state.decided = -1
        self._walk(step, call.copy(), self.state, [], ours=True)

    def _loss(self, call: Call, step: Step, computed: Any, proof: Proof) -> str:
        """Why the pass that `proof` prescribes is not as good as the computed one; empty when it is."""
        try:
            skipped = Output(self._walk(step, call.copy(), proof, [], ours=True)).tensors
            loss = max(map(_distance, Output(computed).tensors, skipped), default=float("inf"))
        except Exception as error:  # noqa: BLE001 - any failure of a skipped pass is a reason not to skip
            return f"a pass without its blocks fails: {type(error).__name__}: {error}"
        half = Output(computed).tensors[0].dtype != torch.float32
        if loss <= (SKIP_TOLERANCE_HALF if half else SKIP_TOLERANCE):
            return ""
        if proof.reorder:
            return f"another order of its tokens changes the output by {loss:.1e}, so they are not all that it goes by"
        return (
            f"skipping its blocks changes the output by {loss:.1e} on identical input, so something other than"
            " an addition happens between them"
        )

    def _refuse(self, reason: str) -> None:
        """Blocks cannot be skipped on this network: cache the whole network instead."""
        rule = self.policy.rule
        if isinstance(rule, Drift):  # a whole network's change is predicted per step, so it has to be added up
            rule = rule.model_copy(update={"accumulate": True})
        self.gate.fall_back(
            NetworkReuse(rule=rule, forecast=self.policy.forecast), f"block caching is refused ({reason})"
        )


class Proof(StackState):
    """A look at a state that was just filled, under which `pieces` are left out; changes nothing.

    reorder: run all tokens of the pieces, in another order.
    """

    def __init__(self, filled: StackState, pieces: tuple[Piece, ...], *, reorder: bool = False) -> None:
        super().__init__(filled.policy)
        self.branches, self.reorder, self._pieces = filled.branches, reorder, pieces
        self.input = filled.input

    def pieces(self, step: Step) -> tuple[Piece, ...]:
        return self._pieces

    def decide(self, step: Step, seen: Evidence) -> bool:
        return True

    def choose(self, step: Step, piece: Piece, entry: Tensor) -> Tensor | None:
        return None

    def chosen(self, step: Step, piece: Piece, entry: Tensor) -> ChosenTokens | None:
        return ChosenTokens(shuffled(entry.shape[1], entry.device)) if self.reorder else None

    def observe(
        self,
        step: Step,
        piece: Piece,
        residuals: list[Tensor],
        chosen: ChosenTokens | None = None,
    ) -> None:
        return None


def _distance(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|a|."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
