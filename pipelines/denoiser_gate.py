"""The denoiser gate: every call of a host's network passes here and is computed, forecast or answered."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.caching.network import NetworkReuse, NetworkState
from hasten.caching.stack import StackReuse, StackState
from hasten.drift import Drift
from hasten.forecast import Hold
from hasten.pipelines.host import Call, Layout, Output, is_whole_compiled
from hasten.pipelines.stack_gate import StackGates
from hasten.session import Attachment
from hasten.step import Step
from hasten.trace import Action, Event

if TYPE_CHECKING:
    from hasten.pipelines.accelerate import Session

SKIP_TOLERANCE, SKIP_TOLERANCE_HALF = 1e-3, 5e-2
"""A skipped pass on the very input that was just computed may differ by this much (relative, max norm)."""


class DenoiserGate:
    """Stands in for `forward` of one network on this instance only.

    site: the network's name in the trace. A call that does not belong to the followed loop (another
    pipeline that shares the network, another thread, no run in progress) goes straight through.
    """

    def __init__(self, session: Session, site: str, model: nn.Module) -> None:
        self.session, self.site, self.model = session, site, model
        self.layout = Layout.of(model)
        self.reuse = session.recipe.reuse
        self.network: NetworkState | None = None
        self.stack: StackState | None = None
        self.gates: StackGates | None = None
        self._attachment = Attachment()
        self._context = threading.local()
        self._proved = False
        self._seen: dict[int, Output] = {}
        self._attach()

    # --- attach, start, release -------------------------------------------------------------------

    def _attach(self) -> None:
        if getattr(self.model, "_compiled_call_impl", None) is not None:
            self._inner = self._attachment.replace(self.model, "_compiled_call_impl", self)
        else:
            self._inner = self._attachment.replace(self.model, "forward", self)
        if hasattr(self.model, "cache_context"):
            self._host_context = self._attachment.replace(self.model, "cache_context", self._named)
        if isinstance(self.reuse, StackReuse):
            if is_whole_compiled(self.model):
                self._fall_back("the whole network is one compiled function; compile its blocks instead")
            else:
                self.gates = StackGates(self.model, self.reuse.lead)
                self.gates.attach()

    @contextlib.contextmanager
    def _named(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        before = getattr(self._context, "name", None)
        self._context.name = name
        try:
            with self._host_context(name, *args, **kwargs):
                yield
        finally:
            self._context.name = before

    def release(self) -> None:
        """Put the network back as it was."""
        if self.gates is not None:
            self.gates.detach()
        self._attachment.restore()
        self.forget()

    def begin_run(self) -> None:
        """Start clean: nothing of an earlier run, whole or broken off, may be reused."""
        times = self.session.clock.run_times
        self.network = self.reuse.start(times) if isinstance(self.reuse, NetworkReuse) else None
        self.stack = self.reuse.start(times) if isinstance(self.reuse, StackReuse) else None
        self._seen = {}

    def forget(self) -> None:
        """Drop all tensors."""
        self.network = self.stack = None
        self._seen = {}

    def num_bytes(self) -> int:
        """Bytes held for later steps."""
        return sum(state.num_bytes() for state in (self.network, self.stack) if state is not None)

    # --- one call ---------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        call = Call(self.layout, args, kwargs)
        session.follow_scheduler()
        context = getattr(self._context, "name", None)
        entered = session.clock.enter(self.site, call.conditioning, context, call.timestep)
        if entered is None:
            return self._inner(*args, **kwargs)
        if torch.is_grad_enabled():
            session.note(f"{self.site}: gradients are enabled, so every call is computed. Use torch.no_grad().")
            return self._inner(*args, **kwargs)
        step, trusted = entered
        x = call.sample
        if not trusted or not isinstance(x, Tensor):
            if not isinstance(x, Tensor):
                session.note(f"{self.site}: its input is a {type(x).__name__}, not a tensor, so nothing is skipped.")
            return self._timed(step, lambda: self._inner(*args, **kwargs), why="not followed")
        return self._followed(step, call, x)

    def _followed(self, step: Step, call: Call, x: Tensor) -> Any:
        """A call of the loop: reuse decides for the step, then guidance for the branch."""
        if self.network is not None and self.network.decide(step, x):
            stand_in = self.network.answer(step, x)
            seen = self._seen.get(step.branch)
            if stand_in is not None and seen is not None:
                self._event(step, self._stand_in_action(), self.network.change)
                return seen.rebuild(stand_in)
        seam = self.session.guidance
        if seam is not None and seam.skips(step, x.shape[0]):
            answered = self._answer_uncond(step, call, x)
            if answered is not None:
                return answered
        output = Output(self._compute(step, call))
        return self._computed(step, x, output, evaluated=True)

    def _answer_uncond(self, step: Step, call: Call, x: Tensor) -> Any:
        """Guidance does not need the unconditional branch here: answer it, or run half of the batch."""
        seam = self.session.guidance
        assert seam is not None and seam.roles is not None
        if seam.roles.batched:
            rows = seam.conditional_rows(x.shape[0])
            output = Output(self._compute(step, call.part(x.shape[0], rows), share=0.5))
            joined = [seam.join(step, output.tensors[0])]
            if len(output.tensors) > 1:
                joined += [torch.cat([tensor, tensor]) for tensor in output.tensors[1:]]
            return self._computed(step, x, Output(output.rebuild(joined)), evaluated=False)
        seen = self._seen.get(step.branch)
        answer = seam.answer(step)
        if answer is None or seen is None:
            return None
        self._event(step, "skip", why="guidance")
        rest = seen.tensors[1:]
        return self._computed(step, x, Output(seen.rebuild([answer, *rest])), evaluated=False)

    def _computed(self, step: Step, x: Tensor, output: Output, *, evaluated: bool) -> Any:
        """Let reuse and guidance learn from a value, and return what the host gets."""
        seam = self.session.guidance
        self._seen[step.branch] = output
        given = output.tensors
        if not given:
            self.session.note(f"{self.site}: it returns no tensor, so nothing is skipped.")
            return output.rebuild([])
        if seam is not None and evaluated:
            seam.evaluated(step, given[0])
        if self.network is not None:
            given = self.network.observe(step, x, given)
        if seam is not None:
            given = [seam.finish(step, given[0]), *given[1:]]
            if evaluated:
                seam.returned(step, given[0])
        self.session.account()
        return output.rebuild(given)

    # --- computing --------------------------------------------------------------------------------

    def _compute(self, step: Step, call: Call, share: float = 1.0) -> Any:
        """Run the network, its blocks gated when a stack policy is on. share: how much of the batch `call` is."""
        if self.stack is None or self.gates is None:
            return self._timed(step, lambda: self._inner(*call.args, **call.kwargs), share=share)
        if not self.gates.stacks and not self._learn(call):
            return self._compute(step, call, share)
        events: list[Event] = []
        result = self._timed(step, lambda: self._walk(step, call, self.stack, events), share=share, events=events)  # type: ignore[arg-type]
        if not self._proved:
            self._prove(step, call, result)
        return result

    def _walk(self, step: Step, call: Call, state: StackState, events: list[Event]) -> Any:
        assert self.gates is not None

        def record(name: str, blocks: tuple[int, int], action: str, deciding: bool) -> None:
            kind: Action = "compute" if action == "compute" else self._stand_in_action()
            signal = state.change if deciding else None
            events.append(self._make(step, kind, f"{self.site}.{name}", blocks, signal))

        return self.gates.run(lambda: self._inner(*call.args, **call.kwargs), step, state, record)

    def _timed(
        self, step: Step, work: Callable[[], Any], why: str = "", share: float = 1.0, events: list[Event] | None = None
    ) -> Any:
        """Run `work` and record it, with its wall time, as one computed evaluation (or as `events`)."""
        began = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - began
        change = self.network.change if self.network is not None else None
        found = events or [self._make(step, "compute", self.site, None, change, why)]
        for position, event in enumerate(found):
            # One measured time for the whole call: it stands on the first event, the others have none.
            timed = dataclasses.replace(event, seconds=seconds if position == 0 else None, share=share)
            self.session.trace.add(timed)
        return result

    def _learn(self, call: Call) -> bool:
        """The first call of all: evaluate once more, to watch how the blocks are chained. False when refused.

        The result is thrown away, so that the first run of a session decides exactly like the later ones.
        """
        gates = self.gates
        assert gates is not None
        gates.watch(lambda: self._inner(*call.args, **call.kwargs))
        if not gates.stacks:
            self._fall_back("; ".join(gates.refused.values()))
            return False
        gates.restrict()
        self.session.note(f"{self.site}: one extra evaluation was spent on discovering its structure.", warn=False)
        for reason in gates.refused.values():
            self.session.note(f"{self.site}: {reason}; these blocks are always computed.", warn=False)
        self.session.trace.structure.pop(self.site, None)
        self.session.trace.structure.update({f"{self.site}.{stack.name}": stack.num for stack in gates.stacks})
        return True

    def _prove(self, step: Step, call: Call, computed: Any) -> None:
        """Skip all blocks on the very input that was just computed: nothing may be lost, or blocks are refused."""
        assert isinstance(self.reuse, StackReuse) and self.stack is not None
        proof = Proof(self.stack)
        try:
            skipped = Output(self._walk(step, call, proof, [])).tensors
            loss = max(map(_distance, Output(computed).tensors, skipped), default=float("inf"))
        except Exception as error:  # noqa: BLE001 - any failure of a skipped pass is a reason not to skip
            self._fall_back(f"a pass without its blocks fails: {type(error).__name__}: {error}")
            return
        tolerance = SKIP_TOLERANCE if Output(computed).tensors[0].dtype == torch.float32 else SKIP_TOLERANCE_HALF
        if not loss <= tolerance:
            self._fall_back(
                f"skipping its blocks changes the output by {loss:.1e} on identical input, so something other than"
                " an addition happens between them"
            )
        self._proved = True

    def _fall_back(self, reason: str) -> None:
        """Blocks cannot be skipped on this network: say why, and cache the whole network instead."""
        assert isinstance(self.reuse, StackReuse)
        policy = self.reuse
        rule = policy.rule.model_copy(update={"accumulate": True}) if isinstance(policy.rule, Drift) else policy.rule
        self.session.note(f"{self.site}: block caching is refused ({reason}); the whole network is cached instead.")
        if self.gates is not None:
            self.gates.detach()
        self.gates, self.stack = None, None
        self.reuse = NetworkReuse(rule=rule, forecast=policy.forecast)
        self.network = self.reuse.start(self.session.clock.run_times)
        self.session.trace.structure = {gate.site: 1 for gate in self.session.gates} or {self.site: 1}

    # --- recording --------------------------------------------------------------------------------

    def _stand_in_action(self) -> Action:
        forecast = getattr(self.reuse, "forecast", None)
        return "reuse" if isinstance(forecast, Hold) else "forecast"

    def _event(self, step: Step, action: Action, signal: float | None = None, why: str = "") -> None:
        self.session.trace.add(self._make(step, action, self.site, None, signal, why))

    def _make(
        self, step: Step, action: Action, site: str, blocks: tuple[int, int] | None, signal: float | None, why: str = ""
    ) -> Event:
        rule = getattr(self.reuse, "rule", None)
        threshold = rule.threshold_value if rule is not None and signal is not None else None
        run = self.session.clock.run
        return Event(run, step.index, step.branch, site, action, blocks, signal, threshold, why=why)


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
