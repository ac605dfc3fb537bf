"""Reuse of a U-Net's deep feature: on skipped steps only its shallow end runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from hasten.caching.histories import Histories, Key
from hasten.caching.rules import Every
from hasten.drift import Rule
from hasten.errors import RecipeError
from hasten.forecast import Forecast, Hold
from hasten.recipe import ReusePolicy
from hasten.step import Step

DEEP = "deep"


class DeepReuse(ReusePolicy):
    """Run the outermost layers of a U-Net and let a forecast stand in for the feature that comes up from below.

    DeepCache (Ma et al., arXiv 2312.00858, section 3.2). Skip connections are counted from the outside: 0 is the input
    convolution's, 1 that of the first down layer, and so on through layers and downsamplers. A skipped step computes the
    down layers that make connections 1 to `branch` + 1 and the up layers that use connections `branch` + 1 to 0;
    the feature that enters the first of those comes from history.

    branch: how deep, 0 the shallowest. rule: a schedule (nothing is measured); decided per step for all branches of
    guidance. forecast: what stands in for the deep feature; `hold` in the paper.
    """

    kind: ClassVar[str] = "deep"
    branch: int = Field(0, ge=0)
    rule: Rule = Every(interval=3)
    forecast: Forecast = Hold()

    @model_validator(mode="after")
    def _schedules_only(self) -> DeepReuse:
        if self.rule.needs_signal or self.rule.needs_errors:
            raise RecipeError(
                f"reuse.rule = {self.rule.kind!r} compares a signal, and deep reuse measures none; allowed are schedules"
                " (every, window, spread, listed). Use the network span for an adaptive rule."
            )
        return self

    def start(self, times: Sequence[float] = ()) -> DeepState:
        """Fresh state for one run of one network. times: `Step.time` of each step, where known."""
        return DeepState(self, times)


class DeepState:
    """State of `DeepReuse` for one run: one decision per step, one deep feature per branch of guidance."""

    def __init__(self, policy: DeepReuse, times: Sequence[float] = ()) -> None:
        self.policy = policy
        self.histories = Histories(policy.forecast)
        self._rule = policy.rule.start(times)
        self._decided = -1
        self._skipping = False

    def answer(self, step: Step, key: Key) -> Tensor | None:
        """The deep feature for this evaluation; None when it has to be computed."""
        if step.index != self._decided:
            self._decided = step.index
            poisoned = self.histories.drop_poisoned()  # a NaN or Inf was computed: forget it and compute afresh
            self._skipping = self._rule.skip(step, None) and not poisoned
        found = self.histories.estimate(step.branch, DEEP, key, step.time) if self._skipping else None
        return None if found is None else found[0]

    def observe(self, step: Step, key: Key, deep: Tensor) -> None:
        """The deep feature was computed."""
        self.histories.store(step.branch, DEEP, key, step.time, [deep])
