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

from hasten.agree import Mean, across, alone, group_of
from hasten.caching.context import ContextReuse
from hasten.caching.deep import DeepReuse
from hasten.caching.modules import ModuleReuse
from hasten.caching.network import NetworkReuse
from hasten.caching.routed import RoutedReuse
from hasten.caching.stack import StackReuse
from hasten.caching.width import WidthReuse
from hasten.forecast import Hold
from hasten.pipelines.attention.seam import AttentionSeam
from hasten.pipelines.host import Call, Layout, Output
from hasten.pipelines.seams.context import ContextSeam
from hasten.pipelines.seams.deep import DeepSeam
from hasten.pipelines.seams.modules import ModuleSeam
from hasten.pipelines.seams.network import NetworkSeam
from hasten.pipelines.seams.reuse import ReuseSeam
from hasten.pipelines.seams.routed import RoutedSeam
from hasten.pipelines.seams.stack import StackSeam
from hasten.pipelines.seams.width import WidthSeam
from hasten.pipelines.seams.writes import Kind, Writes, kind_of
from hasten.recipe import ReusePolicy
from hasten.session import Attachment
from hasten.sparse_attn.policy import SparseAttention
from hasten.step import Step
from hasten.trace import Action, Event

if TYPE_CHECKING:
    from hasten.pipelines.session import Session

SEAMS: dict[type[ReusePolicy], Callable[[DenoiserGate, Any], ReuseSeam]] = {
    NetworkReuse: NetworkSeam,
    StackReuse: StackSeam,
    ModuleReuse: ModuleSeam,
    DeepReuse: DeepSeam,
    ContextReuse: ContextSeam,
    WidthReuse: WidthSeam,
    RoutedReuse: RoutedSeam,
}
"""Which seam puts which policy onto a network. A new span is one policy, one seam and one entry here."""


class DenoiserGate:
    """Stands in for `forward` of one network on this instance only.

    site: the network's name in the trace. A call that does not belong to the followed loop (another
    pipeline that shares the network, another thread, no run in progress) goes straight through.
    """

    def __init__(self, session: Session, site: str, model: nn.Module) -> None:
        self.session, self.site, self.model = session, site, model
        self.layout = Layout.of(model)
        self.reuse: ReusePolicy | None = session.recipe.reuse
        self._attachment = Attachment()
        self._context = threading.local()
        self._seen: dict[int, Output] = {}
        self._kinds: dict[int, Kind] = {}
        self._owed: tuple[Step, Tensor, Output] | None = None
        self.writes = Writes()
        group = session.group if session.group is not None else group_of(model)
        self.agree: Mean = alone if group is None else across(group)
        self.attention: AttentionSeam | None = None
        self.above: list[AttentionSeam] = []
        self._attach()
        try:
            policy = session.recipe.attention
            if isinstance(policy, SparseAttention):
                self.attention = AttentionSeam(self, policy)
            self.seam = self._seam()
        except BaseException:
            if self.attention is not None:
                self.attention.release()
            self._attachment.restore()  # the session does not know this gate yet, so nobody else would
            raise

    # --- attach, start, release -------------------------------------------------------------------

    def _attach(self) -> None:
        if getattr(self.model, "_compiled_call_impl", None) is not None:
            self.inner = self._attachment.replace(self.model, "_compiled_call_impl", self)
        else:
            self.inner = self._attachment.replace(self.model, "forward", self)
        if hasattr(self.model, "cache_context"):
            self._host_context = self._attachment.replace(self.model, "cache_context", self._named)

    def _seam(self) -> ReuseSeam:
        if self.reuse is None:
            return ReuseSeam(self)
        self.seam = ReuseSeam(self)  # a seam may fall back while it is being made
        made = SEAMS[type(self.reuse)](self, self.reuse)
        return made if type(self.seam) is ReuseSeam else self.seam

    def fall_back(self, policy: NetworkReuse, reason: str) -> None:
        """What was asked for is impossible on this network: say why, and cache the whole network instead."""
        self.session.note(f"{self.site}: {reason}; the whole network is cached instead.")
        self.seam.release()
        self.reuse, self.seam = policy, NetworkSeam(self, policy)
        self.seam.begin_run(self.session.clock.run_times)
        self.session.trace.structure = {gate.site: 1 for gate in self.session.gates} or {self.site: 1}

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
        self.seam.release()
        if self.attention is not None:
            self.attention.release()
        self._attachment.restore()
        self.forget()

    def begin_run(self) -> None:
        """Start clean: nothing of an earlier run, whole or broken off, may be reused."""
        self.seam.begin_run(self.session.clock.run_times)
        if self.attention is not None:
            self.attention.begin_run()
        self._seen, self._kinds, self._owed = {}, {}, None

    def forget(self) -> None:
        """Drop all tensors."""
        self.seam.forget()
        if self.attention is not None:
            self.attention.forget()
        self._seen, self._owed = {}, None

    def num_bytes(self) -> int:
        """Bytes held for later steps."""
        return self.seam.num_bytes() + (self.attention.num_bytes() if self.attention is not None else 0)

    # --- one call ---------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        if session.closed:  # another session that was opened later still calls this gate
            return self.inner(*args, **kwargs)
        call = Call(self.layout, args, kwargs)
        session.follow_scheduler()
        context = getattr(self._context, "name", None)
        entered = session.clock.enter(self.site, call.conditioning, context, call.timestep)
        if entered is None:
            return self.inner(*args, **kwargs)
        if torch.is_grad_enabled():
            session.note(
                f"{self.site}: gradients are enabled, so every call is computed. Use torch.no_grad()."
            )
            return self.inner(*args, **kwargs)
        step, trusted = entered
        x = call.sample
        if not trusted or not isinstance(x, Tensor):
            if not isinstance(x, Tensor):
                session.note(
                    f"{self.site}: its input is a {type(x).__name__}, not a tensor, so nothing is skipped."
                )
            return self.timed(step, lambda: self.inner(*args, **kwargs), why="not followed")
        return self._followed(step, call, x)

    def _followed(self, step: Step, call: Call, x: Tensor) -> Any:
        """A call of the loop: reuse decides for the step, then guidance for the branch."""
        if self.session.shape is None:
            self.session.saw(tuple(x.shape[1:]))
        kind = kind_of(call)
        if self._kinds.setdefault(step.branch, kind) != kind:  # what another kind of call has shown may not stand in
            self.begin_run()
            self._kinds[step.branch] = kind
        if self.writes.argument(kind):
            return self.timed(step, lambda: self.evaluate(call), why="it writes into its arguments")
        stand_in = self.seam.answer(step, x)
        seen = self._seen.get(step.branch)
        if stand_in is not None and seen is not None:
            self.session.trace.add(self.event(step, self.stand_in_action(), signal=self.seam.change))
            return seen.rebuild(stand_in)
        for gate in (self, *self.below()):  # those inside, too: their look must not be seen by what acts in this walk
            if gate.attention is not None:
                gate.attention.prepare(call)
        seam = self.session.guidance
        if seam is not None and self.writes.knows(kind) and seam.skips(step, x.shape[0]):
            answered = self._answer_uncond(step, call, x)
            if answered is not None:
                return answered
        output = Output(self.seam.compute(step, call, 1.0))
        if name := self.writes.argument(kind):
            self.session.note(f"{self.site}: it writes into its argument {name}, so such calls are neither skipped nor repeated.")
            self.seam.forget()
        return self._computed(step, x, output, evaluated=True)

    def evaluate(self, call: Call) -> Any:
        """Run the network itself on `call`; all seams come here, so that what it writes into is known."""
        return self.writes.watch(call, lambda: self._attended(call))

    def rehearse(self, call: Call) -> Any:
        """An evaluation of our own that the host has not asked for. Sessions nested inside this one do not see it, but for
        their attention and that of sessions around this one: it reads what it read in the evaluation before."""
        with contextlib.ExitStack() as stack:
            for attention in self.above:
                stack.enter_context(attention.repeating())
            return self.writes.watch(call, lambda: self._repeated(call))

    def _repeated(self, call: Call) -> Any:
        def below() -> Any:
            inner = self.inner
            return inner._repeated(call) if isinstance(inner, DenoiserGate) else inner(*call.args, **call.kwargs)

        return below() if self.attention is None else self.attention.evaluate(call, below, ours=True)

    def _attended(self, call: Call) -> Any:
        """One evaluation, its attention sparse where the recipe says so."""

        def work() -> Any:
            return self.inner(*call.args, **call.kwargs)

        return work() if self.attention is None else self.attention.evaluate(call, work)

    def bare(self, call: Call) -> Any:
        """The network without the sessions nested inside this one, and without notes of what it writes into."""
        *_, last = self, *self.below()
        return last.inner(*call.args, **call.kwargs)

    def below(self) -> Iterator[DenoiserGate]:
        """Gates of the sessions nested inside this one, outermost first."""
        inner = self.inner
        while isinstance(inner, DenoiserGate):
            yield inner
            inner = inner.inner

    def repeatable(self, call: Call) -> bool:
        """May `call`, which was just evaluated, be evaluated again in order to prove something?"""
        return not self.writes.argument(kind_of(call))

    def _answer_uncond(self, step: Step, call: Call, x: Tensor) -> Any:
        """Guidance does not need the unconditional branch here: answer it, or run half of the batch."""
        seam = self.session.guidance
        assert seam is not None and seam.roles is not None
        if seam.roles.batched and kind_of(call):
            self.session.note(f"{self.site}: its arguments hold a state of both branches, so neither can be left out.")
            return None
        if seam.roles.batched:
            rows = seam.conditional_rows(x.shape[0])
            output = Output(self.seam.compute(step, call.part(x.shape[0], rows), 0.5))
            joined = [seam.join(step, output.tensors[0])]
            if len(output.tensors) > 1:
                joined += [torch.cat([tensor, tensor]) for tensor in output.tensors[1:]]
            return self._computed(step, x, Output(output.rebuild(joined)), evaluated=False)
        seen = self._seen.get(step.branch)
        answer = seam.answer(step)
        if answer is None or seen is None:
            return None
        self.session.trace.add(self.event(step, "skip", why="guidance"))
        whole = [answer, *seen.tensors[1:]]
        if not seam.roles.cond_first:  # a placeholder, of which reuse must not learn: what u is follows from c
            self._owed = (step, x, seen)
            return seen.rebuild(whole)
        return self._computed(step, x, Output(seen.rebuild(whole)), evaluated=False)

    def _settled(self, step: Step) -> None:
        """c is known, and with it what stands in for the u that was answered before: let reuse learn from it."""
        seam, owed = self.session.guidance, self._owed
        if owed is None or seam is None:
            return
        before, x, seen = owed
        if before.index == step.index and (u := seam.late(step)) is not None:
            seam.settle(self.seam.observe(before, x, [u, *seen.tensors[1:]])[0])
        if before.index != step.index or step.branch != before.branch:
            self._owed = None

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
        given = self.seam.observe(step, x, given)
        if seam is not None:
            self._settled(step)
            given = [seam.finish(step, given[0]), *given[1:]]
            if evaluated:
                seam.returned(step, given[0])
        self.session.account()
        return output.rebuild(given)

    # --- recording --------------------------------------------------------------------------------

    def timed(
        self,
        step: Step,
        work: Callable[[], Any],
        why: str = "",
        share: float = 1.0,
        events: list[Event] | None = None,
    ) -> Any:
        """Run `work` and record it, with its wall time, as one computed evaluation (or as `events`)."""
        began = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - began
        found = events or [self.event(step, "compute", signal=self.seam.change, why=why)]
        for position, event in enumerate(found):
            # One measured time for the whole call: it stands on the first event, the others have none.
            seen = seconds if position == 0 else None
            timed = dataclasses.replace(event, seconds=seen, share=share * event.share)
            self.session.trace.add(timed)
        return result

    def stand_in_action(self) -> Action:
        """What a stand-in is called in the trace."""
        return "reuse" if isinstance(getattr(self.reuse, "forecast", None), Hold) else "forecast"

    def event(
        self,
        step: Step,
        action: Action,
        site: str = "",
        blocks: tuple[int, int] | None = None,
        signal: float | None = None,
        why: str = "",
        share: float = 1.0,
    ) -> Event:
        """An event of this network (or of `site` inside it) at `step`."""
        rule = getattr(self.reuse, "rule", None)
        threshold = rule.threshold_value if rule is not None and signal is not None else None
        run = self.session.clock.run
        return Event(
            run, step.index, step.branch, site or self.site, action, blocks, signal, threshold, why=why, share=share
        )
