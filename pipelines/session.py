"""`Session`: one recipe on one host, from the moment it is put on until it is taken off exactly."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from hasten.agree import is_sharded
from hasten.caching.network import NetworkReuse
from hasten.clock import Clock
from hasten.errors import HastenError, LimitError, ModelError, UsageError
from hasten.limits import Limits
from hasten.pipelines.host import denoisers, hardware, is_running
from hasten.pipelines.seams.denoiser_gate import DenoiserGate
from hasten.pipelines.seams.draft import Drafted
from hasten.pipelines.seams.guidance import GuidanceSeam
from hasten.pipelines.seams.sampling import change_adapter, change_sampling
from hasten.pipelines.seams.spending import Spending, tolerance_of
from hasten.pipelines.students import taught
from hasten.pipelines.tune.fingerprint import known_by
from hasten.recipe import Recipe
from hasten.samplers.solver import Solver
from hasten.samplers.travel import TimeTravel
from hasten.session import Attachment
from hasten.sparse_attn.policy import SparseAttention
from hasten.step import Step
from hasten.trace import Run, Trace

if TYPE_CHECKING:
    from hasten.report import Report


AXES = ("sampler", "guidance", "reuse", "attention", "adapter")
"""Axes that have a seam on a denoiser and its loop."""


class Session:
    """One recipe on one host. A context manager; `report()` says what was really skipped."""

    def __init__(self, host: Any, recipe: Recipe, scheduler: Any, limits: Limits, group: Any = None) -> None:
        self.host, self.recipe, self.limits, self.group = host, recipe, limits, group
        self.trace = Trace()
        self.clock = Clock(ours=self._ours)
        self.guidance: GuidanceSeam | None = None
        self.spending: Spending | None = None
        self.gates: list[DenoiserGate] = []
        self.attachment = Attachment()
        self._bare_scheduler = scheduler
        self._closed = False
        self._warned: set[str] = set()
        self._drafted: Drafted | None = None
        self._began = 0.0
        self.shape: tuple[int, ...] | None = None
        self.on_close: list[Callable[[], None]] = []
        self.clock.on_run.append(self._run_begins)
        self.clock.on_tick.append(self._tick)
        self.clock.on_end.append(self._run_ends)
        self._put_on(recipe)

    def _put_on(self, recipe: Recipe) -> None:
        """Check that the recipe is one for this host, and put it on."""
        host, models = self.host, denoisers(self.host)
        if recipe.adapter is not None and recipe.adapter.calls is not None:
            recipe = taught(recipe, {} if isinstance(host, nn.Module) else models)
            if recipe.adapter is None:
                self.trace.facts["adapter"] = "none: no student comes with hasten for these weights"
        self.recipe = recipe
        others = [axis for axis in recipe.axes if axis not in AXES]
        if others:
            raise UsageError(
                f"Recipe {recipe.name!r} sets {', '.join(others)}, which {'have' if len(others) > 1 else 'has'} no seam on a"
                f" denoiser ({type(host).__name__}); there are seams for {', '.join(AXES)}. `hasten recipes` says what each"
                " recipe acts on."
            )
        if not isinstance(recipe.attention, SparseAttention | None):
            raise UsageError(
                f"Recipe {recipe.name!r} has attention of kind {recipe.attention.kind!r}, which is for causal language models"
                f" of transformers, and this is a {type(host).__name__}. A denoiser takes kind {SparseAttention.kind!r}, for"
                " example semantic; `hasten recipes` says what each acts on."
            )
        if isinstance(host, nn.Module) and recipe.sampler is not None:
            raise UsageError(f"Recipe {recipe.name!r} swaps the solver, and a bare denoiser has none; swap it in your loop.")
        if isinstance(host, nn.Module) and self._bare_scheduler is None:
            raise ModelError("A bare denoiser has no loop to follow: pass scheduler=, the one whose step() you call.")
        try:
            self._attach(models)
        except BaseException:
            self._take_off()
            raise

    def change(self, recipe: Recipe) -> None:
        """Work with `recipe` from the next run on, as if the session had been opened with it; what has been recorded stays.

        For use between runs. Raises as opening it would, and then goes on with the old one.
        """
        before = self.recipe
        self._take_off()
        self.gates = []
        self.trace.facts.clear()
        try:
            self._put_on(recipe)
        except HastenError:
            self._put_on(before)
            raise

    @property
    def drafting(self) -> bool:
        """Does the recipe call the host again for a draft? Then what is called need not be the caller's."""
        return self._drafted is not None

    def _attach(self, models: dict[str, nn.Module]) -> None:
        self._compare({"scheduler": type(self._scheduler()).__name__} | known_by(models) if self.recipe.tuned else {})
        change_adapter(self, models)
        self._drafted = change_sampling(self)
        self.clock.follow(self._scheduler(), begun=isinstance(self.host, nn.Module))
        for site, model in models.items():
            self.trace.structure[site] = 1
            if self.group is None and is_sharded(model):
                raise UsageError(
                    f"The weights of {site} are spread over ranks, which must then decide alike: pass group=, the process"
                    " group of the ranks that compute one sample (torch.distributed.group.WORLD for all)."
                )
            self.gates.append(DenoiserGate(self, site, model))

    def saw(self, shape: tuple[int, ...]) -> None:
        """The first input of a run: one row of it."""
        self.shape = shape
        self._compare({"shape": shape} | self._asked())

    def _asked(self) -> dict[str, int]:
        """The number of steps that the caller asked for, where it can be told from the number that is walked."""
        sampler, stamp, walked = self.recipe.sampler, self.recipe.tuned, len(self.clock.run_times)
        if sampler is None or stamp is None or stamp.steps is None:
            return {"steps": walked}
        if not isinstance(sampler, Solver) or isinstance(sampler, TimeTravel):
            return {}
        if sampler.times is not None or sampler.name in ("heun", "pndm"):
            return {}
        right = walked == max(1, round(stamp.steps * sampler.steps))
        return {"steps": stamp.steps if right else round(walked / sampler.steps)}

    def _compare(self, here: Mapping[str, Any]) -> None:
        """Say where a tuned recipe was measured on something else."""
        stamp = self.recipe.tuned
        if stamp is not None and (others := stamp.differences(here)):
            self.note(
                f"Recipe {self.recipe.name!r} was tuned and measured elsewhere: another {'; another '.join(others)}. Its numbers do"
                " not hold here; run hasten tune."
            )

    def another(self, recipe: Recipe) -> Session:
        """A session of its own on the same host, inside this one: what makes a draft."""
        return Session(self.host, recipe, None, self.limits, self.group)

    def hold(self, held: int) -> None:
        """Count what a sampler holds, which cannot be dropped."""
        cap = self.limits.max_cache_bytes
        if cap is not None and held > cap:
            raise LimitError(
                f"Keys and values of earlier frames take {held:,} bytes, above the cap of {cap:,}. Set sampler.window, or raise the cap."
            )
        self.trace.hold(held)

    # --- what users ask ---------------------------------------------------------------------------

    @property
    def step(self) -> Step | None:
        """Where the host's loop is now; None between runs."""
        return self.clock.step

    @property
    def closed(self) -> bool:
        """Has the host been restored?"""
        return self._closed

    @property
    def skipped(self) -> float:
        """Share of block work skipped so far in the latest run, 0 to 1."""
        return 1.0 - self.report().computed_fraction if self.trace.runs else 0.0

    def report(self) -> Report:
        """What happened so far, ready to print, to save as JSON or as a page."""
        from hasten.report import Report

        if not self.trace.runs:
            self.note(
                "No run was seen: the host's scheduler was never started, so this recipe did nothing.", warn=self._closed
            )
        for gate in self.gates:
            if gate.attention is not None:
                gate.attention.flush()  # what a run in progress has done so far
        device = next((str(p.device) for gate in self.gates for p in gate.model.parameters()), "cpu")
        return Report(self.trace, self.recipe, hardware=hardware(device))

    def close(self) -> None:
        """Restore the host. Safe to call twice; the report stays available."""
        if self._closed:
            return
        self._closed = True
        for call in self.on_close:
            call()
        self._take_off()

    def _take_off(self) -> None:
        """Everything that the recipe put onto the host."""
        for gate in reversed(self.gates):
            gate.release()
        self.clock.release()
        self.attachment.restore()
        self.guidance = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- what gates ask ---------------------------------------------------------------------------

    def note(self, sentence: str, *, warn: bool = True) -> None:
        """A sentence the user must read: once in the report, once as a warning."""
        if self.trace.note(sentence) and warn:
            self._warn(sentence)

    def follow_scheduler(self) -> None:
        """The host may have been given another scheduler since: follow that one."""
        scheduler = self._scheduler()
        if scheduler is not self.clock.scheduler:
            self.clock.follow(scheduler)

    def account(self) -> None:
        """Count the bytes held; above the cap, drop them and say so."""
        held = sum(gate.num_bytes() for gate in self.gates)
        if self.guidance is not None:
            held += sum(tensor.numel() * tensor.element_size() for tensor in self.guidance.state.tensors())
        self.trace.hold(held)
        cap = self.limits.max_cache_bytes
        if cap is not None and held > cap:
            for gate in self.gates:
                gate.forget()
            self.trace.hold(0)
            self.note(f"Caches reached {held:,} bytes, above the cap of {cap:,}; reuse is off for the rest of this run.")

    def _scheduler(self) -> Any:
        return self._bare_scheduler if self._bare_scheduler is not None else self.host.scheduler

    def _ours(self) -> bool:
        if self._drafted is not None and self._drafted.drafting:
            return False
        return is_running(self.host, self._scheduler())

    # --- what the clock tells ---------------------------------------------------------------------

    def _run_begins(self) -> None:
        self._began, self.shape = time.perf_counter(), None
        times = self.clock.run_times
        self.trace.runs.append(Run(self.clock.run, len(times), times))
        tolerance = tolerance_of(self.recipe)
        self.spending = Spending(tolerance, times) if tolerance is not None else None
        for gate in self.gates:
            gate.begin_run()
        self.guidance = GuidanceSeam(self.recipe.guidance.start()) if self.recipe.guidance is not None else None  # type: ignore[attr-defined]
        if self.spending is not None:
            self._share(self.spending)
        elif isinstance(self.recipe.attention, SparseAttention) and self.recipe.attention.follows:
            self.trace.facts["ledger"] = "attention reads what its recipe says: no part of this recipe keeps an account (auto does)"
        if isinstance(self.recipe.reuse, NetworkReuse):
            for sentence in self.recipe.reuse.remarks(times, self.clock.weights, self.clock.levels):
                self.note(f"{type(self.clock.scheduler).__name__}: {sentence}")

    def _share(self, spending: Spending) -> None:
        """Let all levels spend of one account (reuse has joined when its run began)."""
        spending.account.agree = self.gates[0].agree
        self.trace.facts.pop("guidance", None)
        if self.guidance is not None:
            spending.join_guidance(self.guidance.state)
        for gate in self.gates:
            if gate.attention is not None:
                spending.charge(gate.attention)
                told = "charged by what it says it leaves out" if gate.attention.policy.tells_recall else "not charged: what it leaves out is not known"
                reads = "as much as the account can afford" if gate.attention.policy.follows else "what its recipe says, whatever is left"
                self.trace.facts["ledger"] = f"attention is {told}; it reads {reads}"

    def _tick(self, combined: Any) -> None:
        for gate in self.gates:
            gate.seam.combined(combined)
        if self.guidance is not None:
            self.guidance.tick(combined)
            if self.guidance.refused:
                self._guide_in_full(self.guidance)
                self.guidance = None
        if self.spending is not None and self.clock.step is not None:
            self.spending.passed(self.clock.step)

    def _guide_in_full(self, seam: GuidanceSeam) -> None:
        """Guidance is refused: say why, once; a part that is for hosts with guidance alone says it in the report."""
        if self.spending is not None:
            self.spending.leave_guidance(seam.state)
        if seam.single and self.recipe.guidance is not None and self.recipe.guidance.optional:
            self.trace.facts["guidance"] = "one branch per step, so there is none to leave out"
        else:
            self.note(f"Guidance is evaluated in full: {seam.refused}.")

    def _run_ends(self) -> None:
        run = self.trace.runs[-1]
        run.seconds, run.finished = time.perf_counter() - self._began, True
        estimates = [gate.seam.estimated_error for gate in self.gates]
        run.estimated_error = max((found for found in estimates if found is not None), default=None)
        if self.spending is not None:
            self.spending.account.read()
            run.estimated_error, run.error_by_level = self.spending.account.estimate, self.spending.account.by_level
        for gate in self.gates:
            gate.forget()
        self._say_if_inert(run.index)

    def _say_if_inert(self, run: int) -> None:
        """A method that did nothing says so at once; the report says it again, with the closest signal."""
        if any(gate.writes.refuses for gate in self.gates):
            return  # the user was told already
        events = list(self.trace.of_run(run))
        stood_in = any(event.action in ("reuse", "forecast") for event in events)
        left_out = any(event.action == "skip" or event.share < 1 for event in events)
        name = self.recipe.name or "this recipe"
        if self.recipe.attention is not None:
            sparse = [call for call in self.trace.attended(run) if call.sparse]
            if not sparse:
                self._warn(f"{name}: no attention call was sparse. The report says why.")
            elif all(call.reads_all for call in sparse):
                self._warn(f"{name}: attention left out nothing; every sparse call read all pairs.")
        if self.recipe.reuse is not None and not stood_in and not (self.recipe.reuse.leaves_out and left_out):
            self._warn(f"{name}: reuse skipped nothing; its rule never allowed it. Raise its limit, or see the report.")
        if self.recipe.guidance is not None and self.guidance is not None and not left_out:
            if self.recipe.guidance.optional:
                self.trace.facts["guidance"] = "every evaluation was needed: leaving one out was never affordable"
            else:
                self._warn(f"{name}: guidance left out no evaluation; the branches never agreed enough.")

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(f"hasten: {sentence}", stacklevel=2)
