"""One account for all levels of a run: made when the run starts, brought up to date at each of the solver's steps."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.account import Account, LeftOut
from hasten.caching.network import NetworkReuse
from hasten.ledger import Ledger
from hasten.pipelines.attention.seam import AttentionSeam
from hasten.recipe import Recipe
from hasten.samplers.guidance_ledger import LedgerGuidance, LedgerGuidanceState
from hasten.sparse_attn.policy import SparseAttention
from hasten.step import Step


def tolerance_of(recipe: Recipe) -> float | None:
    """The tolerance that a recipe's levels share, the smallest that one of them names; None where nothing is shared: a
    ledger that is alone has an account of its own."""
    named = []
    if isinstance(recipe.guidance, LedgerGuidance):
        named.append(recipe.guidance.tolerance)
    ledger = isinstance(recipe.reuse, NetworkReuse) and isinstance(recipe.reuse.rule, Ledger)
    if ledger and (named or isinstance(recipe.attention, SparseAttention)):
        named.append(recipe.reuse.rule.tolerance)  # type: ignore[union-attr]
    elif isinstance(recipe.attention, SparseAttention) and not named:
        return None
    return min(named, default=None)


class Spending:
    """The shared account of one run, and what attention is charged on it. times: `Step.time` of each step."""

    def __init__(self, tolerance: float, times: Sequence[float]) -> None:
        self.account, self.times = Account(tolerance), times
        self.charged: list[tuple[AttentionSeam, LeftOut]] = []

    def join_guidance(self, state: object) -> None:
        """Let guidance spend of it, where it keeps an account."""
        if isinstance(state, LedgerGuidanceState):
            state.share(self.account, self.times)

    def leave_guidance(self, state: object) -> None:
        """Guidance does nothing on this host: all is for the others."""
        if isinstance(state, LedgerGuidanceState) and state in self.account.members:
            self.account.members.remove(state)

    def charge(self, attention: AttentionSeam) -> None:
        """Charge what sparse attention leaves out, by its own estimate."""
        member = LeftOut("attention")
        self.account.join(member)
        self.charged.append((attention, member))

    def passed(self, step: Step) -> None:
        """The solver has taken `step`."""
        for attention, member in self.charged:
            share = attention.left_out(step.index)
            member.passed(step, self.times, evaluated=share is not None)
            if share is not None:
                self.account.ask(share, member.told)
            if attention.policy.follows and attention.policy.tells_recall:
                attention.aim(1 - member.affordable(self.account, step, self.times))
