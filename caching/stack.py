"""Reuse of the blocks behind the first few: the first blocks decide, the rest stands in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.drift import Drift, Rule, relative_l1
from hasten.forecast import Forecast, ForecastState, Hold
from hasten.recipe import ReusePolicy
from hasten.step import Step


class StackReuse(ReusePolicy):
    """Run the first `lead` blocks; skip the others when their residual has hardly moved.

    First-block caching (ParaAttention; FnB0 of DBCache) with any rule and any forecast. What is kept is
    R = (last output) - (input behind the lead + everything the model injected on the way), so that
    injections of the present step (ControlNet, VACE, IP-Adapter) still apply on a skipped one.

    lead: blocks that always run; 0 only with rules that need no signal. rule: decided per branch (the
    lead blocks of each branch have run anyway). forecast: what stands in for R.
    """

    kind: ClassVar[str] = "stack"
    lead: int = Field(1, ge=0)
    rule: Rule = Drift(limit=0.08, accumulate=False)
    forecast: Forecast = Hold()

    def start(self, times: Sequence[float] = ()) -> StackState:
        """Fresh state for one run of one network. times: `Step.time` of each step, where known."""
        return StackState(self, times)


class StackState:
    """State of `StackReuse` for one run: a decision per step, a history per branch."""

    def __init__(self, policy: StackReuse, times: Sequence[float] = ()) -> None:
        self.policy = policy
        self.branches: dict[int, StackBranch] = {}
        self.rule = policy.rule.start(times)
        self.decided = -1
        self.skipping = False
        self.change: float | None = None

    def decide(self, step: Step, lead: list[Tensor], shapes: list[torch.Size]) -> bool:
        """May the blocks behind the lead be skipped? lead: residuals of the lead blocks; shapes: of all streams there.

        The first branch of a step decides for all; a branch without a fitting history computes.
        """
        branch = self.branches.setdefault(step.branch, StackBranch())
        if step.index != self.decided:
            self.decided = step.index
            self.change, poisoned = self._read(branch, lead)
            for number in poisoned:  # a NaN or Inf was computed: forget it and compute afresh
                del self.branches[number]
            branch = self.branches.setdefault(step.branch, StackBranch())
            self.skipping = self.rule.skip(step, self.change) and not poisoned
        return self.skipping and branch.fits(shapes)

    def _read(self, branch: StackBranch, lead: list[Tensor]) -> tuple[float | None, list[int]]:
        """The signal and the branches that hold something not finite, in one host synchronisation."""
        signal = branch.change(lead) if self.policy.rule.needs_signal else None
        unread = [(number, other) for number, other in self.branches.items() if other.finite is not None]
        flags = [] if signal is None else [signal]
        flags += [other.finite.float() for _, other in unread if other.finite is not None]
        if not flags:
            return None, []
        values = torch.stack(flags).tolist()
        for _, other in unread:
            other.finite = None
        change = None if signal is None else values.pop(0)
        return change, [number for (number, _), healthy in zip(unread, values, strict=True) if not healthy]

    def estimate(self, step: Step, site: int) -> list[Tensor]:
        """Residuals that stand in for stack number `site`."""
        return [forecast.estimate(step.time) for forecast in self.branches[step.branch].sites[site]]

    def observe_lead(self, step: Step, lead: list[Tensor], shapes: list[torch.Size]) -> None:
        """The step is computed: its lead residuals become the reference."""
        branch = self.branches[step.branch]
        if branch.entry != shapes:
            branch.sites.clear()
        branch.reference, branch.entry = lead, shapes

    def observe(self, step: Step, site: int, residuals: list[Tensor]) -> None:
        """Stack number `site` was computed with these residuals."""
        branch = self.branches[step.branch]
        held = branch.sites.get(site)
        if held is None or branch.shapes.get(site) != [r.shape for r in residuals]:
            held = branch.sites[site] = [self.policy.forecast.start() for _ in residuals]
            branch.shapes[site] = [r.shape for r in residuals]
        for forecast, residual in zip(held, residuals, strict=True):
            forecast.store(step.time, residual)
        branch.finite = torch.stack([torch.isfinite(r).all() for r in residuals]).all()

    def num_bytes(self) -> int:
        """Bytes of all tensors held for later steps."""
        held = {t.data_ptr(): t.numel() * t.element_size() for b in self.branches.values() for t in b.tensors()}
        return sum(held.values())

    def forget(self) -> None:
        """Drop everything held."""
        self.branches.clear()


class StackBranch:
    """What one branch has computed: reference residuals of the lead, and a forecast per stack and stream."""

    def __init__(self) -> None:
        self.reference: list[Tensor] = []
        self.entry: list[torch.Size] = []
        self.sites: dict[int, list[ForecastState]] = {}
        self.shapes: dict[int, list[torch.Size]] = {}
        self.finite: Tensor | None = None

    def fits(self, shapes: list[torch.Size]) -> bool:
        """True when there is a history of these very shapes."""
        return bool(self.sites) and shapes == self.entry and all(f.ready for s in self.sites.values() for f in s)

    def change(self, lead: list[Tensor]) -> Tensor | None:
        """Relative L1 change of the first stream's lead residual, a 0-d tensor; None without a reference."""
        if not self.reference or self.reference[0].shape != lead[0].shape:
            return None
        return relative_l1(lead[0], self.reference[0])

    def tensors(self) -> list[Tensor]:
        return self.reference + [t for site in self.sites.values() for f in site for t in f.tensors()]
