"""Reuse of what single modules return: attention and feed-forward, each kind at its own pace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import model_validator
from torch import Tensor

from hasten.caching.histories import Histories, Key
from hasten.caching.rules import Every
from hasten.drift import Rule
from hasten.errors import RecipeError
from hasten.forecast import Forecast, Hold
from hasten.recipe import ReusePolicy
from hasten.step import Step

Family = Literal["self_attention", "temporal_attention", "cross_attention", "feed_forward"]
FAMILIES: tuple[Family, ...] = ("self_attention", "temporal_attention", "cross_attention", "feed_forward")
"""Kinds of modules. Joint attention (text and image in one softmax) is self-attention."""


class ModuleReuse(ReusePolicy):
    """Run the network, but let forecasts stand in for what some of its modules would return.

    Norms, gates and residual sums around a module run at every step, so the present input still enters there.

    self_attention, temporal_attention, cross_attention, feed_forward: rule of each kind of module; None computes it
    always. Rules are asked once per step, for all branches; they must be schedules, because nothing is measured.
    forecast: what stands in, per branch and module. clock: its axis: "time" is `Step.time`, "step" the step index, in
    which TaylorSeer's official code counts.
    """

    kind: ClassVar[str] = "modules"
    self_attention: Rule | None = Every(interval=2)
    temporal_attention: Rule | None = None
    cross_attention: Rule | None = None
    feed_forward: Rule | None = None
    forecast: Forecast = Hold()
    clock: Literal["time", "step"] = "time"

    @model_validator(mode="after")
    def _schedules_only(self) -> ModuleReuse:
        if not self.rules:
            raise RecipeError(f"reuse of modules needs a rule for at least one of {', '.join(FAMILIES)}; got none.")
        for family, rule in self.rules.items():
            if rule.needs_signal or rule.needs_errors:
                raise RecipeError(
                    f"reuse.{family} = {rule.kind!r} compares a signal, and modules measure none; allowed are schedules"
                    " (every, window, spread, listed). Use the network or stack span for an adaptive rule."
                )
        return self

    @property
    def rules(self) -> dict[Family, Rule]:
        """The kinds of modules that may be skipped, with their rules."""
        found: dict[Family, Rule | None] = {
            "self_attention": self.self_attention,
            "temporal_attention": self.temporal_attention,
            "cross_attention": self.cross_attention,
            "feed_forward": self.feed_forward,
        }
        return {family: rule for family, rule in found.items() if rule is not None}

    def start(self, times: Sequence[float] = ()) -> ModuleState:
        """Fresh state for one run of one network. times: `Step.time` of each step, where known."""
        return ModuleState(self, times)


class ModuleState:
    """State of `ModuleReuse` for one run: one decision per step and family, one history per branch and module."""

    def __init__(self, policy: ModuleReuse, times: Sequence[float] = ()) -> None:
        self.policy = policy
        self.histories = Histories(policy.forecast)
        self.skipping: dict[Family, bool] = {}
        self._rules = {family: rule.start(times) for family, rule in policy.rules.items()}
        self._decided = -1

    def begin(self, step: Step) -> None:
        """An evaluation begins; the first one of a step decides for all its branches."""
        if step.index == self._decided:
            return
        self._decided = step.index
        poisoned = self.histories.drop_poisoned()  # a NaN or Inf was computed: forget it and compute afresh
        skipping = {family: rule.skip(step, None) for family, rule in self._rules.items()}
        self.skipping = {family: skips and not poisoned for family, skips in skipping.items()}

    def answer(self, step: Step, site: str, family: Family, key: Key) -> list[Tensor] | None:
        """What stands in for what module `site` returns, or None when it has to be computed."""
        if not self.skipping.get(family, False):
            return None
        return self.histories.estimate(step.branch, site, key, self._coordinate(step))

    def observe(self, step: Step, site: str, key: Key, values: list[Tensor]) -> None:
        """Module `site` was computed."""
        self.histories.store(step.branch, site, key, self._coordinate(step), values)

    def _coordinate(self, step: Step) -> float:
        return step.time if self.policy.clock == "time" else float(step.index)
