"""Reuse of blocks inside the network: a span of them is left out, and what they added stands in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.agree import Mean, alone
from hasten.caching.spans import AllBlocks, Itinerary, Piece, Span
from hasten.caching.stack_signals import Evidence, LeadChange, StackSignal, StackSignalState
from hasten.caching.tokens import Tokens, TokenState
from hasten.drift import Drift, Rule
from hasten.forecast import Forecast, ForecastState, Hold
from hasten.recipe import ReusePolicy
from hasten.step import Step

Key = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]
"""What streams look like; a history fits only streams that look the same."""


class StackReuse(ReusePolicy):
    """Leave out a span of blocks while a signal says that what they add has hardly moved.

    What is kept, for each piece of the span, is R = (its output) - (its input + everything the model injected on the
    way), so that injections of the present step (ControlNet, VACE, IP-Adapter) still apply on a skipped one.

    lead, back: blocks at both ends that always run (F_n and B_n of DBCache; first-block caching is lead 1, back 0). lead
    0 needs a rule without a signal, or a signal other than `lead_change`. span: which of the others may be left out at a
    step. signal, rule: decided once per step, by the first branch. forecast: what stands in for R.
    tokens: which tokens run nevertheless; None for none. Acts on stacks of one stream, and says so elsewhere.
    """

    kind: ClassVar[str] = "stack"
    lead: int = Field(1, ge=0)
    back: int = Field(0, ge=0)
    span: Span = AllBlocks()
    signal: StackSignal = LeadChange()
    rule: Rule = Drift(limit=0.08, accumulate=False)
    forecast: Forecast = Hold()
    tokens: Tokens | None = None

    @model_validator(mode="after")
    def _has_what_it_watches(self) -> StackReuse:
        if self.rule.needs_errors:
            raise ValueError(
                f"reuse.rule = {self.rule.kind!r} spends an error budget, which is measured for whole networks only; use it"
                " with kind: network"
            )
        if self.lead == 0 and self.rule.needs_signal and self.signal.needs_lead:
            raise ValueError(
                f"signal {self.signal.kind!r} watches the leading blocks, and lead = 0 leaves none;"
                " use lead = 1, another signal, or a rule without one"
            )
        return self

    @property
    def remarks(self) -> list[str]:
        """What the user should know before the first step."""
        found = [self.span.remark, self.signal.remark if self.rule.needs_signal else ""]
        return [remark for remark in found if remark]

    def itinerary(self, sizes: tuple[int, ...], total: int, *, turns: bool = False) -> Itinerary:
        """Which blocks may be left out when. sizes: blocks of each list; turns: do these take turns? total: steps of the run."""
        return Itinerary(self.span, sizes, total, self.lead, self.back, turns=turns)

    def start(self, times: Sequence[float] = ()) -> StackState:
        """Fresh state for one run of one network. times: `Step.time` of each step, where known."""
        return StackState(self, times)


class StackState:
    """State of `StackReuse` for one run: a decision per step, a history per branch and piece.

    change: what the latest decision was based on. apart: whether some tokens may run without the others, which the
    seam has to prove first. agree: makes the numbers of all ranks that share a sample one; the seam sets it.
    input: shape, dtype and device of the network's input, which padded streams do not show; the seam sets it, too.
    """

    apart = False
    agree: Mean = staticmethod(alone)
    input: Key = ()

    def __init__(self, policy: StackReuse, times: Sequence[float] = ()) -> None:
        self.policy = policy
        self.rule = policy.rule.start(times)
        self.branches: dict[int, StackBranch] = {}
        self.decided = -1
        self.skipping = False
        self.change: float | None = None
        self._sizes: tuple[int, ...] = ()
        self._turns = False
        self._total = -1
        self._itinerary: Itinerary | None = None

    # --- where ------------------------------------------------------------------------------------

    def lay_out(self, sizes: tuple[int, ...], *, turns: bool = False) -> None:
        """The network has these numbers of blocks in its lists, which may take turns. Told before the first decision."""
        self._sizes, self._turns, self._itinerary = sizes, turns, None

    def itinerary(self, step: Step) -> Itinerary:
        if self._itinerary is None or step.total != self._total:
            self._total = step.total
            self._itinerary = self.policy.itinerary(self._sizes, step.total, turns=self._turns)
        return self._itinerary

    def pieces(self, step: Step) -> tuple[Piece, ...]:
        """What may be left out at `step`."""
        return self.itinerary(step).at(step)

    def wanted(self, step: Step) -> tuple[Piece, ...]:
        """What has to be learned when `step` is computed."""
        return self.itinerary(step).later(step)

    # --- whether ----------------------------------------------------------------------------------

    def decide(self, step: Step, seen: Evidence) -> bool:
        """May the blocks of `pieces(step)` be left out? The first branch of a step decides for all.

        A branch without a fitting history computes.
        """
        branch = self._branch(step, seen)
        if step.index != self.decided:
            self.decided = step.index
            self.change, poisoned = self._read(step, branch, seen)
            for number in poisoned:  # a NaN or Inf was computed: forget it and compute afresh
                del self.branches[number]
            branch = self._branch(step, seen)
            able = not poisoned and any(held.knows(self.pieces(step)) for held in self.branches.values())
            # A step at which nothing can stand in is a computed one, whatever was measured: the rule counts anew from it.
            self.skipping = self.rule.skip(step, self.change if able else None) and able
        skips = self.skipping and branch.knows(self.pieces(step))
        if not skips and self.policy.rule.needs_signal:
            branch.signal.computed(step, seen)
        return skips

    def _branch(self, step: Step, seen: Evidence) -> StackBranch:
        """This branch's history, a new one where the streams look otherwise than before."""
        key = (*self.input, *key_of(seen.streams))
        branch = self.branches.get(step.branch)
        if branch is None or branch.key != key:
            branch = self.branches[step.branch] = StackBranch(self.policy, key)
        return branch

    def _read(self, step: Step, branch: StackBranch, seen: Evidence) -> tuple[float | None, list[int]]:
        """The signal and the branches that hold something not finite, in one host synchronisation at most."""
        signal = branch.signal.measure(step, seen) if self.policy.rule.needs_signal else None
        unread = [(number, other) for number, other in self.branches.items() if other.finite is not None]
        flags = [signal.float()] if isinstance(signal, Tensor) else []
        flags += [other.finite.float() for _, other in unread if other.finite is not None]
        values = self.agree(torch.stack(flags)).tolist() if flags else []
        for _, other in unread:
            other.finite = None
        change = values.pop(0) if isinstance(signal, Tensor) else signal
        return change, [number for (number, _), healthy in zip(unread, values, strict=True) if not healthy >= 1]

    # --- what stands in ---------------------------------------------------------------------------

    def fits(self, step: Step, piece: Piece, entry: list[Tensor]) -> bool:
        """Is there a history of `piece` for streams that look like `entry`?"""
        history = self.branches[step.branch].histories.get(piece)
        return history is not None and history.key == key_of(entry)

    def estimate(self, step: Step, piece: Piece) -> list[Tensor]:
        """What stands in for the residuals of `piece`, one per stream."""
        return [forecast.estimate(step.time) for forecast in self.branches[step.branch].histories[piece].forecasts]

    def choose(self, step: Step, piece: Piece, entry: Tensor) -> Tensor | None:
        """Indices of the tokens that will run on skipped steps behind this computed one; None for none."""
        tokens, watch = self.policy.tokens, self._watch(step, piece, entry, computed=True)
        if tokens is None or watch is None or not self.apart:
            return None
        count = tokens.count(step, entry.shape[1])
        return watch.pick(count) if count else None

    def chosen(self, step: Step, piece: Piece, entry: Tensor) -> ChosenTokens | None:
        """The tokens that run through `piece` on this skipped step, which `entry` enters; None for none."""
        self._watch(step, piece, entry, computed=False)
        tokens = self.policy.tokens
        runs = tokens is not None and tokens.runs(step, self.change)
        return self.branches[step.branch].histories[piece].chosen if runs else None

    def _watch(self, step: Step, piece: Piece, entry: Tensor, *, computed: bool) -> TokenState | None:
        """Let the choice of tokens see what enters `piece`."""
        if self.policy.tokens is None:
            return None
        watches = self.branches[step.branch].tokens
        if piece not in watches:
            watches[piece] = self.policy.tokens.start()
        watches[piece].see(step, entry, computed=computed)
        return watches[piece]

    def observe(
        self,
        step: Step,
        piece: Piece,
        residuals: list[Tensor],
        chosen: ChosenTokens | None = None,
    ) -> None:
        """`piece` was computed with these residuals. chosen: the tokens that ran among themselves as well."""
        branch = self.branches[step.branch]
        wanted = self.wanted(step)
        for stale in [held for held in branch.histories if held not in wanted]:
            del branch.histories[stale]
            branch.tokens.pop(stale, None)
        history = branch.histories.get(piece)
        if history is None or history.key != key_of(residuals):
            history = branch.histories[piece] = PieceHistory(self.policy, residuals)
        for forecast, residual in zip(history.forecasts, residuals, strict=True):
            forecast.store(step.time, residual)
        history.chosen = chosen
        if self.policy.rule.needs_signal:
            branch.signal.learned(step, piece, residuals[0])
        healthy = torch.stack([torch.isfinite(r).all() for r in residuals]).all()
        branch.finite = healthy if branch.finite is None else branch.finite & healthy

    def num_bytes(self) -> int:
        """Bytes of all tensors held for later steps."""
        held = {t.data_ptr(): t.numel() * t.element_size() for b in self.branches.values() for t in b.tensors()}
        return sum(held.values())

    def forget(self) -> None:
        """Drop everything held."""
        self.branches.clear()


class StackBranch:
    """What one branch has seen and computed, for streams that look like `key`."""

    def __init__(self, policy: StackReuse, key: Key) -> None:
        self.key = key
        self.signal: StackSignalState = policy.signal.start()
        self.histories: dict[Piece, PieceHistory] = {}
        self.tokens: dict[Piece, TokenState] = {}
        self.finite: Tensor | None = None

    def knows(self, pieces: tuple[Piece, ...]) -> bool:
        """True when all of `pieces`, at least one, have a history."""
        return bool(pieces) and all(piece in self.histories for piece in pieces)

    def tensors(self) -> list[Tensor]:
        watched = [t for state in self.tokens.values() for t in state.tensors()]
        return self.signal.tensors() + watched + [t for history in self.histories.values() for t in history.tensors()]


@dataclass(frozen=True, slots=True)
class ChosenTokens:
    """Tokens that run on skipped steps. index: int64 [count]. lack: [batch, count, channels], what the others add to them."""

    index: Tensor
    lack: Tensor | None = None


class PieceHistory:
    """A forecast of each stream's residual over one piece."""

    def __init__(self, policy: StackReuse, residuals: list[Tensor]) -> None:
        self.key = key_of(residuals)
        self.forecasts: list[ForecastState] = [policy.forecast.start() for _ in residuals]
        self.chosen: ChosenTokens | None = None

    def tensors(self) -> list[Tensor]:
        held = [tensor for forecast in self.forecasts for tensor in forecast.tensors()]
        extra = [] if self.chosen is None else [self.chosen.index, self.chosen.lack]
        return held + [tensor for tensor in extra if tensor is not None]


def key_of(streams: list[Tensor]) -> Key:
    """Shape, dtype and device of each stream."""
    return tuple((stream.shape, stream.dtype, stream.device) for stream in streams)
